"""How a process that runs for months is looked after: its log, its metrics, its health, its pages.

    logs.py        lines with times, for a person or as JSON
    metrics.py     what is counted for Prometheus; each name passes the door of `fedtune.privacy.publication`
    endpoint.py    /healthz, /readyz, /metrics and pages on a port of their own
    pages.py       a page of ours, with the policy by which a browser shows it; base.css is of all pages

What is counted, and what a page shows, belongs to whoever counts: `fedtune.deploy.server_metrics` and
`node_metrics`, `fedtune.serving.metrics`.
"""
