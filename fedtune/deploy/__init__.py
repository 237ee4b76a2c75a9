"""A real federation: Flower's SuperLink and SuperNodes, with TLS and node keys.

    provision.py, certificates.py   one federation file -> a folder for the server, an archive for each site
    server.py                       `fedtune server`: a SuperLink that relays, and runs nobody's code
    gate.py, admission.py           what of it is open to whom; whom it lets in now
    enrolment.py                    which keys are enrolled and which are revoked, as files
    site.py, node.py                `fedtune node`: a SuperNode for one site, which runs its own fedtune only
    join.py, executor.py            may this site join, and why not; every message gets an answer
    worker.py, channel.py           the process that keeps encoder, data and ledger between the messages
    operator.py                     `fedtune submit`, `fedtune status`: the ServerApp, where its person is
    thin.py, reach.py               the only app that a node accepts; is the server there, and the right one

The apps are those of every other engine (`fedtune.federation`).
"""
