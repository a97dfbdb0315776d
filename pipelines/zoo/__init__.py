"""A synthetic hub: classifiers trained on any labelled images, with the truth about each of their logits.

The papers measure on INet-Hub, classifiers of random subsets of ImageNet's classes, since nobody knows what the
logits of the real Hub recognise. This makes the like of it, at any scale and from any images.
"""
