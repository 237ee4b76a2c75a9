"""Texts, labels, persons and sites: from where they lie to the arrays that training reads.

    sources    load_corpus(config.data, seed) -> (train, test)       opinions | hub | files
    tokenize   Corpus -> TokenizedCorpus, once, cached on disk
    partition  TokenizedCorpus -> one Shard a node                   natural | iid | dirichlet
    batches    a drawn batch -> micro-batches of few shapes
    prepare    all of the above for one Config, cached in the process

Only this package meets `datasets` and `flwr_datasets`, and it imports them late.
"""
