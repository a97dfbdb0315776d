"""What a full run will take, from a finished crawl and from models that were measured: ``probelog-index plan``.

``known`` reads the catalogue by the download's own rules and says which models to measure first, ``measured`` reads a
ledger, ``predict`` fits what a model costs and adds it up, and ``run`` is the command.
"""
