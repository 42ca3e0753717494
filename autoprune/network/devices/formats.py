"""Which number format, and which memory format of images, a network runs in here.

Decides what of an earlier probe is remembered, when that is no longer believed, and in which words the choice is told.
Must not know of policies or of recipes.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.errors import InputError
from autoprune.files import write_whole
from autoprune.network.data.staging import Device
from autoprune.network.devices.failures import out_of_memory
from autoprune.network.devices.precision import Precision
from autoprune.network.devices.probing import BASE, Probe, is_image, probe_precision, times_of, why_not
from autoprune.network.devices.processor import processor_text, without_bfloat16
from autoprune.network.graph.copies import deep_copy

SCHEMA = 1
STALE = 1.3
"""A remembered choice that takes so many times as long as what it beat is measured anew."""
_CHECK = 0.15
"""Seconds of a check of what is remembered; twice that at most."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A number format and why it was chosen; `earlier`: it was measured by an earlier call.

    `images`: there was a memory format to choose as well.
    """

    precision: Precision
    reasons: tuple[str, ...] = ()
    earlier: bool = False
    images: bool = True


def told(choices: Mapping[str, Choice]) -> list[str]:
    """Returns the sentences that say what was chosen for each use: one where the uses agree, none without a reason."""
    groups: dict[tuple[Precision, bool], list[str]] = {}
    for use, choice in choices.items():
        if choice.reasons:
            groups.setdefault((choice.precision, choice.earlier), []).append(use)
    lines = []
    for (precision, earlier), uses in groups.items():
        of = "" if len(uses) == len(choices) else f" of {' and '.join(uses)}"
        reasons = dict.fromkeys(reason for use in uses for reason in choices[use].reasons)
        since = " (measured earlier on this kind of processor)" if earlier else ""
        text = precision_text(precision)
        if not any(choices[use].images for use in uses):
            text = text.split(", ")[0]
        lines.append(f"number format{of}: {text}: {'; '.join(reasons)}{since}")
    return lines


def _choice(probe: Probe, *, training: bool, device: Device, earlier: bool = False) -> Choice:
    images = any(precision.channels_last for precision in (*probe.milliseconds, *probe.left_out))
    return Choice(probe.precision, _reasons(probe, training=training, device=device), earlier, images)


def _reasons(probe: Probe, *, training: bool, device: Device) -> tuple[str, ...]:
    """Returns in words why a probe's choice was made."""
    chosen, took = probe.precision, probe.milliseconds
    half = chosen.autocast_dtype is not None
    kind = "a training pass" if training else "an evaluation pass"
    cpu = torch.device(device).type == "cpu"
    clock = "processor time" if cpu else "time"
    how = f", median of {probe.readings}" if cpu and probe.readings > 1 else ""
    reasons = [] if probe.refused is None else [probe.refused]

    def beside(one: Precision, other: Precision, whose: str) -> str:
        times = f"{took[one]:.3g} and {took[other]:.3g} ms{how}"
        return f"{took[one] / max(took[other], 1e-9):.2f} of {whose} {clock} ({times})"

    found = []
    others = [p for p in took if (p.autocast_dtype is not None) != half]
    other = min(others, key=took.__getitem__, default=None)
    if other is not None and half:
        found.append(beside(chosen, other, "float32's"))
    elif other is not None:
        gain = "" if took[other] > took[chosen] else ", no clear gain"
        what = beside(other, chosen, "float32's")
        reasons.append(f"{kind} in bfloat16 takes {what}{gain}")
    layout = replace(chosen, channels_last=not chosen.channels_last)
    if layout in took:
        whose = f"channels {'first' if chosen.channels_last else 'last'}'s"
        ratio = took[chosen] / max(took[layout], 1e-9)
        found.append(f"{ratio:.2f} of {whose}" if found else beside(chosen, layout, whose))
    if found:
        reasons.append(f"{kind} takes {' and '.join(found)}")
    reasons += [f"the network does not run in {precision_text(p)}: {error}" for p, error in probe.left_out.items()]
    return tuple(reasons)


def precision_text(precision: Precision) -> str:
    """Returns a number format as a short text, such as `bfloat16, channels last`."""
    dtype = str(precision.autocast_dtype or torch.float32).removeprefix("torch.")
    return f"{dtype}, channels {'last' if precision.channels_last else 'first'}"


def precision_from(text: str) -> Precision:
    """Reads what `precision_text` wrote.

    Raises:
        InputError: It is no such text.
    """
    formats = [Precision(dtype, last) for dtype in (None, torch.bfloat16) for last in (True, False)]
    found = next((precision for precision in formats if precision_text(precision) == text), None)
    if found is None:
        raise InputError(f"unknown number format {text!r}")
    return found


def remembered_choice(
    path: Path, model: nn.Module, examples: Callable[[], Tensor], *, device: Device, training: bool
) -> Choice:
    """Returns the fastest variant: as `path` has it where that still holds, else by a probe, which `path` then has.

    It is remembered because a probe is a race: a resumed search must not go on in another format. It is believed only
    where the device can still do it and a few passes do not show it clearly slower than what it beat; and where it is
    measured anew, another variant must be clearly faster.

    Args:
        path: The file; one of another schema, or of an earlier version without any, counts as missing.
        model: The network; it is not changed.
        examples: Gives the samples to run.
        device: Where it runs.
        training: Whether passes go backward too.
    """
    known = _read(path, device)
    if known is not None and known.precision.autocast_dtype is not None and without_bfloat16(device) is not None:
        known = None
    doubt = None
    if known is not None:
        doubt = _doubt(known, model, examples(), device=device, training=training)
        if doubt is None:
            return _choice(known, training=training, device=device, earlier=True)
    keep = None if known is None else known.precision
    probe = probe_precision(model, examples(), device=device, training=training, keep=keep)
    _write(path, probe, device)
    choice = _choice(probe, training=training, device=device)
    return choice if doubt is None else replace(choice, reasons=(doubt, *choice.reasons))


def named_choice(dtype: torch.dtype | None, model: nn.Module, example: Tensor, *, training: bool) -> Choice:
    """Returns a number format that was asked for, with channels-last images where the network runs in them.

    Two samples are run on the CPU, in float32: code that wants another memory format (`.view` behind a convolution)
    says so there as anywhere.
    """
    if not is_image(example):
        return Choice(Precision(dtype, channels_last=False), images=False)
    last = Precision(None, channels_last=True)
    twin = deep_copy(model).to("cpu")
    errors = [why_not(twin, example[:2].to("cpu"), precision, training=training) for precision in (last, BASE)]
    if errors[0] is None or errors[1] is not None:  # what runs in neither will say so where it is used
        return Choice(replace(last, autocast_dtype=dtype))
    reason = f"the network does not run in channels last: {errors[0]}"
    return Choice(Precision(dtype, channels_last=False), (reason,))


def _doubt(known: Probe, model: nn.Module, example: Tensor, *, device: Device, training: bool) -> str | None:
    """Returns what speaks against a remembered choice; None where it holds.

    A few passes of it and of what it beat take turns, with as many samples as fit. Where already two take long nothing
    is run: only a short pass is ever read wrong.
    """
    rival = known.rival
    if rival is None:
        return None
    pair = (known.precision, rival)
    longest = max(known.milliseconds[precision] for precision in pair) / 1000
    count = min(known.samples, len(example), int(known.samples * _CHECK / (len(pair) * 2) / max(longest, 1e-9)))
    if count < min(2, len(example)):
        return None
    try:
        times, left_out = times_of(
            deep_copy(model).to(device),
            example[:count].to(device),
            pair,
            device=device,
            training=training,
            seconds=_CHECK,
        )
    except RuntimeError as error:
        if out_of_memory(error):  # beside a search that runs
            return None
        raise
    text = precision_text(known.precision)
    if known.precision in left_out:
        return f"measured anew, as the network does not run in {text} as it did: {left_out[known.precision]}"
    if rival in left_out:
        return None
    ratio = statistics.median(times[known.precision]) / max(statistics.median(times[rival]), 1e-9)
    if ratio <= STALE:
        return None
    other = precision_text(rival)
    if rival.channels_last == known.precision.channels_last:
        text, other = text.split(", ")[0], other.split(", ")[0]
    return f"measured anew, as {text}, chosen earlier, now takes {ratio:.2f} of the time of {other}"


def _read(path: Path, device: Device) -> Probe | None:
    """Returns what a file holds of a probe on this kind of device; None where it holds no such thing."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["schema"] != SCHEMA or stored["processor"] != processor_text(device):
            return None
        return Probe(
            precision_from(stored["precision"]),
            {precision_from(text): float(took) for text, took in stored["milliseconds"].items()},
            {precision_from(text): str(error) for text, error in stored["left_out"].items()},
            stored["refused"],
            int(stored["readings"]),
            int(stored["samples"]),
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError, InputError):
        return None


def _write(path: Path, probe: Probe, device: Device) -> None:
    stored: dict[str, Any] = {
        "schema": SCHEMA,
        "precision": precision_text(probe.precision),
        "processor": processor_text(device),
        "milliseconds": {precision_text(p): round(took, 4) for p, took in probe.milliseconds.items()},
        "readings": probe.readings,
        "samples": probe.samples,
        "left_out": {precision_text(p): error for p, error in probe.left_out.items()},
        "refused": probe.refused,
    }
    write_whole(path, json.dumps(stored, indent=2).encode())
