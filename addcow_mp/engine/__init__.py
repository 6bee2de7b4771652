"""Plan, pool, worker, publisher: how clusters are moved by several processes."""
