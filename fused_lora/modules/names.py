"""Names of modules: as other releases of transformers have them, and in messages.

In messages: a few of many, those near a wrong one, and what was probably renamed.
"""

from __future__ import annotations

import re
from bisect import bisect
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from itertools import islice

# beginnings of one model's names in different releases of transformers and on disk; each goes both ways
_BEGINNINGS = (
    ("model.language_model.", "language_model.model."),  # LLaVA and its kin, before and after transformers 4.52
    ("model.language_model.", "language_model."),
    ("model.vision_tower.", "vision_tower."),
    ("model.vision_tower.", "vision_tower.vision_model."),  # CLIP and SigLIP inside others, before transformers 5
    ("model.vision_tower.", "model.vision_tower.vision_model."),
    ("vision_tower.", "vision_tower.vision_model."),
    *(
        (f"model.{part}.", f"{part}.")
        for part in ("visual", "vision_model", "audio_tower", "image_tower", "video_tower")
    ),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head", "language_model.lm_head"),
    ("lm_head", "embed_out"),  # GPT-NeoX
    ("model.", "backbone."),  # Nemotron-H
    ("vision_model.", ""),  # CLIP and SigLIP
    ("text_model.", ""),
)
# Qwen2-VL and its kin, whose old names are those of a text model
TEXT_INSIDE = ("model.language_model.", "model.")
# what a text model has that a vision model with layers of the same names has not
_OF_TEXT = "embeddings.token_embedding", "embeddings.word_embeddings"
_SHOWN = 8
# names of a file may be many, and of any length and depth
_LONGEST, _DEEPEST, _COMPARED = 120, 32, 10_000


def other_beginnings(path: str, more: Iterable[tuple[str, str]] = ()) -> set[str]:
    """What ``path`` may be called elsewhere; ``more``: further pairs of beginnings, which go both ways."""
    found = set()
    for a, b in (*_BEGINNINGS, *more):
        for old, new in ((a, b), (b, a)):
            if path.startswith(old):
                found.add(new + path.removeprefix(old))
    return found - {path}


def renamed(paths: Iterable[str], known: Container[str]) -> dict[str, str]:
    """{path: its name in ``known``} of paths that other releases of transformers have under another beginning.

    Empty unless each path has one name there, and no two the same. What is for the text part of a model is not for a
    text model, so that name goes one way. The layers of CLIP's text and vision model have the same names, so what is
    for the one is not for the other alone.
    """
    names: dict[str, str] = {}
    inside, alone = TEXT_INSIDE
    absent = "vision_model." if any(name in known for name in _OF_TEXT) else "text_model."
    for path in paths:
        others = other_beginnings(path) | {inside + path.removeprefix(alone) if path.startswith(alone) else path}
        if path.startswith(absent):
            others -= {path.removeprefix(absent)}
        found = {path} if path in known else {other for other in others if other in known}
        if len(found) != 1:
            return {}
        names[path] = found.pop()
    return {old: new for old, new in names.items() if old != new} if len({*names.values()}) == len(names) else {}


def some(names: Iterable[str], near: str | None = None) -> str:
    """At most 8 of the names, quoted, and how many more there are; "none" for none. ``near`` picks its neighbours in
    alphabetical order."""
    names, start = list(names), 0
    if near is not None:
        names.sort()
        start = max(0, min(bisect(names, near) - _SHOWN // 2, len(names) - _SHOWN))
    shown = [repr(name if len(name) <= _LONGEST else f"{name[:_LONGEST]}...") for name in names[start : start + _SHOWN]]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return ", ".join(shown) + more or "none"


def mismatch(missing: Iterable[str], total: int, present: Iterable[str]) -> str:
    """In one sentence: which of ``total`` layers of an adapter the model lacks, the likely rename, and what it has.

    A layer number is shown as "*" where all layers of that kind are meant.
    """
    missing, present = list(missing), list(present)
    known = {_pattern(path) for path in present}
    lacking = dict.fromkeys(path if _pattern(path) in known else ".".join(_pattern(path)) for path in missing)
    text = f"{len(missing)} of the adapter's {total} layers are no layers of the model that take LoRA: {some(lacking)}"
    rename = likely_rename(missing, present)
    if rename is not None:
        old, new, fitting = rename
        text += f"; likely rename: {old!r} -> {new!r}, which fits {fitting} of them"
    has = dict.fromkeys(".".join(_pattern(path)) for path in present)
    return f"{text}; the model has {len(present)}: {some(has)}"


def likely_rename(missing: Iterable[str], present: Iterable[str]) -> tuple[str, str, int] | None:
    """(old, new, how many paths it mends): the part of the missing paths that other paths have in its place.

    Layer numbers count as equal. None if no path ends as a missing one does.
    """
    patterns = Counter(p for p in map(_pattern, islice(missing, _COMPARED)) if len(p) <= _DEEPEST)
    known = list(dict.fromkeys(_pattern(path) for path in present))
    by_end: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for parts in known:
        for end in _ends(parts):
            by_end.setdefault(end, []).append(parts)
    votes: Counter[tuple[tuple[str, ...], tuple[str, ...]]] = Counter()
    for parts, count in patterns.items():
        end = next((end for end in _ends(parts) if end in by_end), None)
        if end is not None and parts not in known:
            other = max(by_end[end], key=lambda p: len({*p} & {*parts}))
            votes[_difference(parts, other)] += count
    if not votes:
        return None
    (old, new), _ = votes.most_common(1)[0]
    wanted, length = set(known), len(old)
    fitting = sum(
        count
        for parts, count in patterns.items()
        if any(
            parts[i : i + length] == old and (*parts[:i], *new, *parts[i + length :]) in wanted
            for i in range(len(parts) - length + 1)
        )
    )
    return ".".join(old), ".".join(new), fitting


def _pattern(path: str) -> tuple[str, ...]:
    return tuple("*" if re.fullmatch(r"\d+", part) else part for part in path.split("."))


def _ends(parts: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The last parts of a path, longest first."""
    return (parts[i:] for i in range(len(parts)))


def _difference(old: tuple[str, ...], new: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What is left of two paths without their common ends."""
    shorter = min(len(old), len(new))
    same_end = next((i for i in range(shorter) if old[-1 - i] != new[-1 - i]), shorter)
    old, new = old[: len(old) - same_end], new[: len(new) - same_end]
    shorter = min(len(old), len(new))
    same_start = next((i for i in range(shorter) if old[i] != new[i]), shorter)
    return old[same_start:], new[same_start:]
