"""A real federation: Flower's SuperLink and SuperNodes, with TLS and node keys.

    provision.py     one federation file -> certificates, a folder for the server, an archive for each site
    certificates.py  the keys and certificates themselves, and what is wrong with them, in words
    server.py        `fedtune server`: a SuperLink that relays, and runs nobody's code
    node.py          `fedtune node`: a SuperNode for one site, which runs its own installed fedtune only
    worker.py        the process that keeps encoder, data and ledger between the messages
    submit.py        `fedtune submit`: the ServerApp, in the process of whoever submits

The apps are those of every other engine (`fedtune.federation`).
"""
