"""What a full run will take, from a finished crawl and from models that were measured: ``probelog-index plan``.

``known`` reads the catalogue by the download's own rules, ``measured`` a ledger; ``regression`` fits what a model
costs, ``predict`` adds it up, ``sample`` says which models to measure first, and ``run`` is the command.
"""
