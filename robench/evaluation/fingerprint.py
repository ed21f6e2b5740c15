"""Whether a run still is the function that was judged: what it returns for fixed images, kept beside its rows.

Weights and the name of an architecture do not say what is computed: code, a library's release or a dtype may have
changed since.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from robench.core.ensemble import Ensemble
from robench.core.fast import ROUNDING, disagreement
from robench.core.files import Damaged, content_key, read_tensors, write_tensors
from robench.core.frozen import frozen
from robench.core.rng import Stream
from robench.evaluation.soundness import keyed_torch
from robench.store.runs import Run

FILE = "fingerprint.safetensors"
IMAGES = 16
#: Side of the coarse half of the images.
COARSE = 4


def fixed_images(shape: torch.Size, device: torch.device) -> Tensor:
    """The images of every fingerprint, (B,C,H,W) in [0, 1] for a ``shape`` (C,H,W): half white noise, half coarse."""
    stream, half = Stream(("fingerprint",)), IMAGES // 2
    fine = stream.uniform((half, *shape), "fine")
    coarse = stream.uniform((half, shape[0], COARSE, COARSE), "coarse")
    smooth = F.interpolate(coarse, size=tuple(shape[1:]), mode="bilinear", align_corners=False)
    return torch.cat([fine, smooth]).to(device)


@dataclass(frozen=True)
class Recognised:
    """What `recognise` found of a run.

    Attributes:
        identity: of the function that the run is now; keys of cells hold it.
        changed: how far its outputs lie from those that were judged last, as a part of their scale; 0 within rounding.
    """

    identity: str
    changed: float = 0.0
    _run: Run | None = None
    _kept: dict[str, Tensor] = field(default_factory=dict)

    def keep(self) -> None:
        """Records that this is what is judged from now on."""
        if self._run is not None:
            about = {"current": self.identity, "run": self._run.identity}
            write_tensors(self._run.folder / FILE, self._kept, about)


def judged_identity(run: Run) -> str:
    """The identity of ``run`` as it was judged last: what its rows are looked up by, without loading it."""
    return _read(run)[1]


def recognise(run: Run, ensemble: Ensemble, shape: torch.Size, device: torch.device) -> Recognised:
    """Compares what ``ensemble``, loaded from ``run``, returns for fixed images of a ``shape`` (C,H,W) with what it
    returned whenever it was judged. Writes nothing, see `Recognised.keep`.

    The first function that is judged has the identity of the run: of architecture and weights. Another one, whose
    outputs differ by more than rounding, has its own, and so its own rows.
    """
    try:
        with keyed_torch(device, "fingerprint"), frozen(ensemble), torch.no_grad():
            outputs = ensemble.logits(fixed_images(shape, device)).flatten(0, 1).float().cpu()
    except Exception:  # a model that cannot be judged at all is refused, in words, where it is
        return Recognised(judged_identity(run))
    if not bool(outputs.isfinite().all()):
        return Recognised(judged_identity(run))
    kept, current = _read(run)
    own = {name: value for name, value in kept.items() if name.endswith(f"/{'x'.join(map(str, shape))}")}
    for name, value in own.items():
        if value.shape == outputs.shape and disagreement(outputs, value) <= ROUNDING["float32"]:
            identity = name.partition("/")[0]
            return Recognised(identity, _apart(outputs, own, current, identity), run, kept)
    identity = current
    if own:
        digest = hashlib.sha256(outputs.numpy().tobytes()).hexdigest()
        identity = content_key({"run": run.identity, "outputs": digest})
    kept = {**kept, f"{identity}/{'x'.join(map(str, shape))}": outputs}
    return Recognised(identity, _apart(outputs, own, current, identity), run, kept)


def _apart(outputs: Tensor, own: dict[str, Tensor], current: str, identity: str) -> float:
    before = next((value for name, value in own.items() if name.partition("/")[0] == current), None)
    if identity == current or before is None or before.shape != outputs.shape:
        return 0.0
    return disagreement(outputs, before)


def _read(run: Run) -> tuple[dict[str, Tensor], str]:
    """Outputs by identity and shape, and the identity that was judged last; of other weights nothing counts."""
    if not (run.folder / FILE).exists():
        return {}, run.identity
    tensors, metadata = read_tensors(run.folder / FILE)
    if "current" not in metadata:
        raise Damaged(f"{run.folder / FILE} is damaged", "remove it and run the same command again")
    return (tensors, metadata["current"]) if metadata.get("run") == run.identity else ({}, run.identity)
