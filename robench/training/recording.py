"""Training steps as CUDA graphs: a GPU takes longer to be told the thousands of small operations of such networks than
to do them. The loss and the gradients of a step are recorded once and replayed on every other batch: the same kernels
in the same order.

What a step depends on beside weights is its batch and its draws. Images, labels and uniform noise are written into the
tensors that were recorded; a choice (`Stream.below`), such as DVERGE's layer, has a recording for each value. A loss
that needs anything else, such as the part of the training that is done, or that waits for the device, is not recorded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError, in_a_line
from robench.core.rng import Part, Stream
from robench.core.streams import release
from robench.defenses import Batch

log = logging.getLogger(__name__)

#: The terms of a loss, whose gradients are then in the parameters.
Gradients = Callable[[Ensemble, Batch], dict[str, Tensor]]
#: Records a call: what runs it again, and what it returns. The first argument is called once to warm up, then recorded.
Record = Callable[[Callable[[], dict[str, Tensor]], Callable[[], None]], tuple[Callable[[], None], dict[str, Tensor]]]


class NotRecorded(RobenchError):
    """A step cannot be recorded; the message says why."""


class _Unknown(float):
    """`Batch.progress` of a step that is recorded once for all: a loss that reckons with it is none."""

    def _refuse(self, *others: object) -> NoReturn:
        raise NotRecorded("it changes with the part of the training that is done")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _refuse
    __pow__ = __rpow__ = __neg__ = __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = __float__ = _refuse


@dataclass(frozen=True)
class _Draw:
    """A draw of a step: of which of a batch's two streams, from what purpose, and its shape, or of how many."""

    epoch: bool
    purpose: tuple[Part, ...]
    shape: tuple[int, ...]

    def stream(self, batch: Batch) -> Stream:
        return batch.epoch_draws if self.epoch else batch.draws

    def uniform(self, batch: Batch) -> Tensor:
        return Stream(self.stream(batch).owner).uniform(self.shape, *self.purpose)

    def choice(self, batch: Batch) -> int:
        return Stream(self.stream(batch).owner).below(self.shape[0], *self.purpose)


@dataclass
class _Tape:
    """The draws of one recording, in their order, with the tensors that hold the uniform ones."""

    batch: Batch
    noise: list[tuple[_Draw, Tensor]] = field(default_factory=list)
    choices: list[_Draw] = field(default_factory=list)
    at: int = 0

    def uniform(self, draw: _Draw) -> Tensor:
        if self.at == len(self.noise):
            self.noise.append((draw, draw.uniform(self.batch).to(self.batch.images.device)))
        wanted, held = self.noise[self.at]
        if wanted != draw:
            raise NotRecorded("its draws differ from call to call")
        self.at += 1
        return held

    def fill(self, batch: Batch) -> None:
        """Writes the draws of ``batch`` into the tensors that were recorded."""
        for draw, held in self.noise:
            held.copy_(draw.uniform(batch), non_blocking=True)


@dataclass(frozen=True)
class _Noted(Stream):
    """A stream of a batch whose draws are noted on a tape."""

    tape: _Tape
    epoch: bool
    purpose: tuple[Part, ...] = ()

    def key(self, *purpose: Part) -> int:
        raise NotRecorded("it draws by a key of its own")

    def uniform(self, shape: Sequence[int], *purpose: Part) -> Tensor:
        return self.tape.uniform(_Draw(self.epoch, (*self.purpose, *purpose), tuple(shape)))

    def below(self, count: int, *purpose: Part) -> int:
        draw = _Draw(self.epoch, (*self.purpose, *purpose), (count,))
        if draw not in self.tape.choices:  # members share theirs
            self.tape.choices.append(draw)
        return draw.choice(self.tape.batch)

    def within(self, *purpose: Part) -> Stream:
        return replace(self, purpose=(*self.purpose, *purpose))


@dataclass
class _Recording:
    tape: _Tape
    replay: Callable[[], None]
    terms: dict[str, Tensor]
    slopes: list[Tensor | None]


class Recorded:
    """`Gradients` by recordings, one for each value of a step's choices, made when it first comes.

    Of one ensemble, whose weights stay where they are, and batches of one size. Raises `NotRecorded`.
    """

    def __init__(self, compute: Gradients, record: Record) -> None:
        self._compute = compute
        self._record = record
        self._given: Batch | None = None
        self._choices: list[_Draw] | None = None
        self._found: dict[tuple[int, ...], _Recording] = {}

    def __call__(self, ensemble: Ensemble, batch: Batch) -> dict[str, Tensor]:
        if batch.state:
            raise NotRecorded("it keeps something between steps")
        given = self._take(batch)
        recording = self._found.get(self._place(batch))
        if recording is None:
            recording = self._make(ensemble, batch, given)
            self._found[self._place(batch)] = recording
        recording.tape.fill(batch)
        recording.replay()
        for parameter, slope in zip(ensemble.parameters(), recording.slopes, strict=True):
            parameter.grad = slope
        return {name: value.clone() for name, value in recording.terms.items()}

    def _take(self, batch: Batch) -> Batch:
        """The batch that is recorded, with this one's images and labels."""
        if self._given is None:
            self._given = replace(
                batch,
                images=batch.images.clone(),
                labels=batch.labels.clone(),
                paired=None if batch.paired is None else batch.paired.clone(),
                samples=None if batch.samples is None else batch.samples.clone(),
                progress=_Unknown("nan"),
            )
        else:
            for name in ("images", "labels", "paired", "samples"):
                held, new = getattr(self._given, name), getattr(batch, name)
                if held is not None:
                    held.copy_(new)
        return self._given

    def _place(self, batch: Batch) -> tuple[int, ...]:
        return (batch.turn, *(draw.choice(batch) for draw in self._choices or ()))

    def _make(self, ensemble: Ensemble, batch: Batch, given: Batch) -> _Recording:
        # With the draws of this batch, and no images of its own.
        tape = _Tape(replace(given, draws=batch.draws, epoch_draws=batch.epoch_draws))
        noted = replace(
            given,
            draws=_Noted(batch.draws.owner, tape, epoch=False),
            epoch_draws=_Noted(batch.epoch_draws.owner, tape, epoch=True),
            turn=batch.turn,
            state={},
        )

        def call() -> dict[str, Tensor]:
            tape.at = 0
            tape.choices.clear()
            ensemble.zero_grad(set_to_none=True)
            terms = self._compute(ensemble, noted)
            if noted.state:
                raise NotRecorded("it keeps something between steps")
            return terms

        before = {name: value.clone() for name, value in ensemble.named_buffers()}

        def restore() -> None:
            """BatchNorm's statistics have moved while warming up."""
            for name, value in ensemble.named_buffers():
                value.copy_(before[name])

        devices = [given.images.device] if given.images.is_cuda else []
        try:
            # Dropout of what is replayed draws what it would have drawn.
            with torch.random.fork_rng(devices=devices):
                replay, terms = self._record(call, restore)
        except BaseException:
            restore()
            ensemble.zero_grad(set_to_none=True)
            raise
        if self._choices is not None and self._choices != tape.choices:
            raise NotRecorded("its choices differ from call to call")
        self._choices = list(tape.choices)
        return _Recording(tape, replay, terms, [parameter.grad for parameter in ensemble.parameters()])


def or_plain(mine: Recorded, plain: Gradients) -> Gradients:
    """``mine``, and ``plain`` from the first step on that cannot be recorded: one warning says why."""
    recorded: Recorded | None = mine

    def gradients(ensemble: Ensemble, batch: Batch) -> dict[str, Tensor]:
        nonlocal recorded
        if recorded is not None:
            try:
                return recorded(ensemble, batch)
            except Exception as error:  # whatever recording may raise
                recorded = None  # with its memory
                log.warning(f"training goes on without CUDA graphs: {in_a_line(error)}")
        ensemble.zero_grad(set_to_none=True)
        return plain(ensemble, batch)

    return gradients


def cuda_record(device: torch.device) -> Record:
    """Records CUDA graphs; all share their memory, as one is replayed at a time."""
    pool: Any = torch.cuda.graph_pool_handle()

    def record(
        call: Callable[[], dict[str, Tensor]], restore: Callable[[], None]
    ) -> tuple[Callable[[], None], dict[str, Tensor]]:
        with torch.cuda.device(device):
            side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                call()
            torch.cuda.current_stream(device).wait_stream(side)
            restore()
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, pool=pool):
                    terms = call()
            finally:
                release()
        return graph.replay, terms

    return record
