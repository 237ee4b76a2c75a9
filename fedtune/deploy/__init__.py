"""A real federation: Flower's SuperLink and SuperNodes, with TLS and node keys.

    provision.py, certificates.py     one federation file -> a folder for the server, an archive for each site
    server.py, admission.py           `fedtune server`: a SuperLink that relays and runs nobody's code; which
                                      sites it lets in, and why not the others
    site.py, node.py                  `fedtune node`: a site's own file, and its SuperNode
    join.py                           may this site join, and why not; what it publishes of its budget
    message_loop.py, thin_app.py      every message gets an answer; the only app that a node accepts
    worker_process.py, channel.py,    the process that holds encoder, data and ledger between messages
    worker.py
    submit.py                         `fedtune submit`, `fedtune status`: the ServerApp, where its person is
    progress.py, view.py              how runs go on, told to the server; what it knows of sites and runs
    server_metrics.py,                what server and node count, and answer on their administrator's port
    node_metrics.py
    flower.py                         every touch of Flower's internals

The apps are those of every other engine (`fedtune.federation`).
"""
