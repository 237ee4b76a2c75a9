"""A federation in one process and in virtual time, on disks that fail and over a network that loses:
FoundationDB's way of testing.

Real are the server's loop (`fedtune.federation.server`), the checkpoint, each site's worker
(`fedtune.deploy.worker.answer`) with its release path, policy, ledger and audit log, and secure
aggregation. Toys are the model, the data and the training. Simulated are time, the disks (`disk`), what
lies between server and sites (`network`), and when machines die (`simulation`). One number, the seed,
decides all that is drawn; noise, keys and secrets are drawn from the operating system as ever, and nothing
that happens depends on them.

What must hold, whatever happens (`witness`):

- no data is touched, and no update leaves, that is not charged; no charge pays for two;
- a site is charged for no more rounds than it agreed to, and for none that it did not begin, unless
  something failed;
- a round that the person at the keyboard was told of is in the result, once; the result is the sum of its
  rounds;
- ledger and audit log verify after each crash and each power cut, and go on from what the server kept of
  them;
- a run that was interrupted goes on, and ends; whoever is told of a failure is told in a paragraph.

    scripts/simulate                      10,000 seeds from 0
    scripts/simulate --seed 17            one, with all that happens
    scripts/simulate --mutant no-fsync    with a fault in fedtune, which must be found
"""
