"""The demo's world: a small hub of real classifiers of icons, made from fonts and a seed."""
