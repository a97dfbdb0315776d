"""Generators found by classifiers: those that make what a classifier, or one of its logits, was taught.

    uv run python -m tests.benchmarks.generator_classifiers INDEX TRUTH CLASSIFIERS

INDEX holds both kinds; TRUTH says what its generators make (`probelog-index zoo --generators`, or `generator_galleries`) and
CLASSIFIERS what its classifiers were taught (`pipelines/demo/world/truth.json`). Asked with are the classifiers, each weights once, and the
logits of which some generator makes anything.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from probelog.evaluation.generators import measures
from probelog.search.client import Index, open_index


def main() -> None:
    """Ask, and print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("index")
    parser.add_argument("truth", type=Path)
    parser.add_argument("classifiers", type=Path)
    arguments = parser.parse_args()
    made = {
        item["repo"]: frozenset(item["concepts"])
        for item in json.loads(arguments.truth.read_text())["generators"]
    }
    taught = json.loads(arguments.classifiers.read_text())
    names = [frozenset(item) for item in taught["classes"]]
    with open_index(arguments.index) as index:
        by_classifier: dict[str, Collection[str]] = {}
        by_logit: dict[str, Collection[str]] = {}
        seen: set[str] = set()
        for repo, model in taught["models"].items():
            if repo not in index or repo in seen:
                continue
            seen |= {repo, *index.show(repo, limit=0).same_weights}
            known = [frozenset().union(*(names[number] for number in logit)) for logit in model["logits"]]
            by_classifier[repo] = frozenset().union(*known)
            by_logit |= {f"{repo}#{number}": concepts for number, concepts in enumerate(known)}
        for title, asked in (("classifiers", by_classifier), ("logits", by_logit)):
            print(f"{title}: {_figures(index, asked, made)}")


def _figures(index: Index, asked: Mapping[str, Collection[str]], made: Mapping[str, Collection[str]]) -> str:
    """How early the generators come that make any of what is asked for by each name."""
    scores, relevant = [], []
    for like, concepts in asked.items():
        hits = {
            hit.repo: hit.score for hit in index.search(kind="generator", like=like, k=int(index.generators))
        }
        makers = [bool(made[repo] & frozenset(concepts)) for repo in made if repo in hits]
        if any(makers):
            scores.append([hits[repo] for repo in made if repo in hits])
            relevant.append(makers)
    found = 100 * measures(np.array(scores), np.array(relevant)).mean(axis=0)
    return (
        f"{len(scores)} with makers, {np.sum(relevant, axis=1).mean():.1f} of {len(relevant[0])} generators each: top-1 "
        f"{found[0]:.1f}, top-5 {found[1]:.1f}, mAP {found[3]:.1f}; chance {100 * np.mean(relevant):.1f}"
    )


if __name__ == "__main__":
    main()
