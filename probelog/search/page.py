"""Answers as one self-contained HTML page: the probes' pictures are in it, and it loads nothing and runs nothing.

Whatever uploaders and publishers wrote is escaped. Pictures are ``data:`` addresses; the content security policy allows
these and the page's own style, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Iterable, Sequence

from probelog.search.evidence import Evidence, EvidenceProbe
from probelog.search.results import Answers, Hit, ModelFacts, ModelSummary
from probelog.terminal import printable

_STYLE = """
:root { color-scheme: light dark; font: 15px/1.4 system-ui, sans-serif; }
body { margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }
article { border-top: 1px solid #8888; padding: 1rem 0; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin: 0; overflow-wrap: anywhere; }
p { margin: .3rem 0; overflow-wrap: anywhere; } .note { font-style: italic; }
.strip { display: flex; flex-wrap: wrap; gap: .4rem; margin: .5rem 0; }
figure { margin: 0; width: 6rem; font-size: .75rem; }
figure img, figure span { box-sizing: border-box; width: 6rem; height: 6rem; object-fit: cover; display: block;
  border: 3px solid #2a7; }
figure.estimated img, figure.estimated span { border: 3px dashed #d80; }
figure.unknown img, figure.unknown span { border-color: #888; }
""".strip()
_POLICY = (
    "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
    f"style-src 'sha256-{base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()}'"
)
_LEGEND = (
    "Below each probe: the logit's value on it, in standard deviations over all probes. Dashed: the model did not see this "
    "probe, completion estimated the value."
)
# Characters of what uploaders wrote.
_LONGEST = 200


def answers_page(title: str, hits: Sequence[Hit], notes: Sequence[str], evidence: Sequence[Evidence]) -> str:
    """The hits of one query with their evidence, in the same order."""
    articles = [_article(hit, shown) for hit, shown in zip(hits, evidence, strict=True)]
    return _page(
        title, [*(f'<p class="note">{_text(note)}</p>' for note in notes), _legend(evidence), *articles]
    )


def model_page(summary: ModelSummary, evidence: Sequence[Evidence]) -> str:
    """What the first logits of a model recognise, as many as there is evidence of."""
    parts = [f"<p>{_link(summary.url, 'commit ' + summary.sha)}, {_facts(summary)}</p>", _legend(evidence)]
    for logit, shown in zip(summary.logits, evidence, strict=False):
        names = ", ".join(_text(name) for name in logit.concepts)
        parts.append(
            f"<article><h2>{_class(logit.logit, logit.label, logit.negated)}</h2>"
            f"<p>recognises most likely: {names or 'unknown'}</p>{_strips(shown)}</article>"
        )
    if len(evidence) < len(summary.logits):
        parts.append(f'<p class="note">The first {len(evidence):,} of {len(summary.logits):,} logits.</p>')
    return _page(summary.repo, parts)


def answers_table(answers: Answers[Hit]) -> str:
    """Hits as a table for a notebook."""
    titles = "".join(f"<th>{name}</th>" for name in ("#", "model", "class", "label", "confidence", "score"))
    rows = "".join(
        f"<tr><td>{hit.rank}</td><td>{_link(hit.url, hit.repo)}</td><td>{hit.logit}</td>"
        f"<td>{'not ' * hit.negated}{_text(hit.label)}</td><td>{_share(hit.confidence)}</td>"
        f"<td>{hit.score:.2f}</td></tr>"
        for hit in answers
    )
    notes = "".join(f"<p>{_text(note)}</p>" for note in answers.notes)
    return f"{notes}<table><thead><tr>{titles}</tr></thead><tbody>{rows}</tbody></table>"


def _article(hit: Hit, shown: Evidence) -> str:
    numbers = [f"score {hit.score:.2f}"]
    if hit.confidence is not None:
        numbers.insert(0, f"confidence {_share(hit.confidence)}")
    if hit.duplicates:
        numbers.append(f"{hit.duplicates:,} more with these weights")
    return (
        f"<article><h2>{hit.rank}. {_link(hit.url, hit.repo)}</h2>"
        f"<p>{_class(hit.logit, hit.label, hit.negated)}: {', '.join(numbers)}</p><p>{_facts(hit)}</p>"
        f"{_strips(shown)}</article>"
    )


def _facts(model: ModelFacts) -> str:
    facts = [model.library, model.architecture, f"licence {model.licence or 'unknown'}"]
    if model.downloads is not None:
        facts.append(f"{model.downloads:,} downloads")
    return ", ".join(map(_text, facts))


def _class(logit: int, label: str, negated: bool) -> str:
    return f"class {logit}, {'not ' * negated}declared as <q>{_text(label)}</q>"


def _legend(evidence: Sequence[Evidence]) -> str:
    if any(probe.observed is None for item in evidence for probe in item.strongest):
        return '<p class="note">This index does not say which probes the models saw: an older version published it.</p>'
    return f"<p>{_LEGEND}</p>"


def _strips(shown: Evidence) -> str:
    strips = f'<p>fires most on</p><div class="strip">{_figures(shown.strongest)}</div>'
    if shown.weakest:
        strips += f'<p>fires least on</p><div class="strip">{_figures(shown.weakest)}</div>'
    return strips


def _figures(probes: Iterable[EvidenceProbe]) -> str:
    return "".join(map(_figure, probes))


def _figure(item: EvidenceProbe) -> str:
    state = {True: "seen", False: "estimated", None: "unknown"}[item.observed]
    caption = f"{item.value:+.1f} {state}" if item.value is not None else "value unknown"
    if item.picture is None or item.media_type is None:
        picture = f"<span>probe {item.probe}</span>"
    else:
        data = base64.b64encode(item.picture).decode()
        picture = f'<img src="data:{_text(item.media_type)};base64,{data}" alt="probe {item.probe}">'
    return f'<figure class="{state}">{picture}<figcaption>{caption}</figcaption></figure>'


def _link(url: str, text: str) -> str:
    return f'<a href="{html.escape(url)}" rel="noopener noreferrer nofollow">{_text(text)}</a>'


def _share(confidence: float | None) -> str:
    return "-" if confidence is None else f"{confidence:.0%}"


def _text(text: object) -> str:
    return html.escape(printable(text, limit=_LONGEST))


def _page(title: str, parts: Iterable[str]) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{html.escape(_POLICY)}">'
        '<meta name="viewport" content="width=device-width"><meta name="referrer" content="no-referrer">'
        f"<title>{_text(title)} - ProbeLog</title><style>{_STYLE}</style></head>\n"
        f"<body><main><h1>{_text(title)}</h1>\n" + "\n".join(parts) + "\n</main></body></html>\n"
    )
