"""Where published weights lie: a source that the user names becomes a file here, and what is known of it."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlsplit

from robench.core.errors import RobenchError
from robench.core.files import file_hash, write_tensors
from robench.core.hub import api, asking, client, endpoint

Values = tuple[float, ...]

#: How the weights in a file are called; of a repository's files the first is taken where there are several.
_ENDINGS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".tar")
_USUAL = ("model.safetensors", "pytorch_model.bin")
#: Where torch.hub's own weights, releases and shared files lie.
TORCH, GITHUB, DRIVE = "https://download.pytorch.org/models", "https://github.com", "https://docs.google.com"
#: Torch hub's custom: the first digits of a file's SHA-256 end its name.
_HASHED = re.compile(r"-([0-9a-f]{8,64})\.\w+(?:\.tar)?$")
#: Seconds without an answer.
_TIMEOUT = 60


@dataclass(frozen=True)
class FetchedWeights:
    """Weights that lie here.

    Attributes:
        path: the file.
        origin: for the manifest: ``source`` as the user named it, ``sha256`` of the file, and ``revision`` or ``url``.
        model: the architecture; normalisation: mean and standard deviation; classes: how many the weights tell apart;
            None where the source says nothing of it.
    """

    path: Path
    origin: dict[str, str]
    model: str | None = None
    normalisation: tuple[Values, Values] | None = None
    classes: int | None = None


def fetch(text: str, folder: Path) -> FetchedWeights:
    """The weights that ``text`` names: a path, ``hf:OWNER/REPO[/FILE][@REVISION]``, ``timm:NAME``, ``torchhub:FILE``,
    ``torchhub:OWNER/REPO:TAG/FILE``, ``robustbench:[DATASET/THREAT/]NAME`` or ``https://...[#sha256=HASH]``.

    No code of a source runs. What is downloaded goes into ``folder``.

    Raises:
        RobenchError: nothing there, a page instead of a file, another hash than was named, a package that is missing.
    """
    scheme, colon, rest = text.partition(":")
    fetcher = _FETCHERS.get(scheme) if colon else None
    if fetcher is not None:
        return fetcher(text, rest, folder)
    path = Path(text)
    if not path.is_file():
        raise RobenchError(
            f"{text} does not exist or is not a file; expected .pth or .safetensors, or a source: "
            f"{', '.join(f'{name}:...' for name in _FETCHERS)}"
        )
    return FetchedWeights(path, {"source": path.name, "sha256": file_hash(path)})


def _web(text: str, rest: str, folder: Path) -> FetchedWeights:
    url, _, wanted = text.partition("#")
    name, equals, digest = wanted.partition("=")
    if wanted and (name != "sha256" or not equals or not re.fullmatch("[0-9a-f]{64}", digest.lower())):
        raise RobenchError(f"expected #sha256= and 64 digits after the address, got #{wanted}")
    if not wanted and url.startswith("http:"):
        raise RobenchError(f"{url} can be changed on its way; use https, or say its hash: {url}#sha256=...")
    path = _download(url, folder / (Path(urlsplit(url).path).name or "weights"), digest.lower())
    return FetchedWeights(path, {"source": url, "sha256": file_hash(path), "url": url})


def _download(url: str, path: Path, digest: str = "") -> Path:
    """``url`` as a file whose SHA-256 begins with ``digest``."""
    opener = urllib.request.build_opener(*([_OnlyHttps()] if url.startswith("https:") else []))
    seen = hashlib.sha256()
    try:
        asked = urllib.request.Request(url, headers={"User-Agent": "robench"})
        with opener.open(asked, timeout=_TIMEOUT) as answer, path.open("wb") as file:
            while block := answer.read(1 << 20):
                seen.update(block)
                file.write(block)
    except (URLError, OSError, ValueError) as error:  # an HTTP status is one of the first
        raise RobenchError(f"{url} cannot be downloaded ({error}); download it yourself and name the file") from error
    refuse_page(path, url)
    if not seen.hexdigest().startswith(digest):
        raise RobenchError(
            f"{url} has SHA-256 {seen.hexdigest()}, expected {digest}: it is another file than the one that was meant"
        )
    return path


class _OnlyHttps(urllib.request.HTTPRedirectHandler):
    """Follows no way out of https."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if urlsplit(newurl).scheme != "https":
            raise URLError(f"it leads to {newurl}, which can be changed on its way")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def refuse_page(path: Path, text: str) -> None:
    """RobenchError where a file holds a web page, or Git LFS's note of a file instead of it."""
    with path.open("rb") as file:
        start = file.read(512).lstrip()
    if start.startswith(b"<"):
        raise RobenchError(
            f"{text} is a web page (HTML), no weights: a login, a warning or a viewer; take the address of the file "
            f"itself (on GitHub `raw`, on Hugging Face `resolve`)"
        )
    if start.startswith(b"version https://git-lfs"):
        raise RobenchError(f"{text} is Git LFS's note of a file, not the file; git lfs pull, or download it")


# --- Hugging Face, and timm's weights, which lie there


def _hub(text: str, rest: str, folder: Path) -> FetchedWeights:
    named, _, revision = rest.partition("@")
    owner, _, tail = named.partition("/")
    repository, _, file = tail.partition("/")
    if not owner or not repository:
        raise RobenchError(f"expected hf:OWNER/REPO, and where needed /FILE and @REVISION, got {text!r}")
    with asking(text):
        info = api().model_info(f"{owner}/{repository}", revision=revision or None)
    files = [str(each.rfilename) for each in info.siblings or ()]
    chosen = file or _chosen(text, files)
    if chosen not in files:
        raise RobenchError(f"{text}: no file {chosen!r}; there are {', '.join(sorted(files)[:12])}")
    with asking(text):
        where = {"revision": info.sha, "local_dir": folder, "endpoint": endpoint()}
        hub = client()
        path = Path(hub.hf_hub_download(f"{owner}/{repository}", chosen, **where))
        told = Path(hub.hf_hub_download(f"{owner}/{repository}", "config.json", **where)) if _TOLD in files else None
    refuse_page(path, text)
    origin = {"source": text, "sha256": file_hash(path), "revision": str(info.sha)}
    return FetchedWeights(path, origin, **_says(json.loads(told.read_text("utf-8")) if told else {}))


#: Where a repository says how its network is built.
_TOLD = "config.json"


def _says(config: Any) -> dict[str, Any]:
    """Architecture, classes and normalisation as timm writes them down."""
    inner = config.get("pretrained_cfg") if isinstance(config, dict) else None
    if not isinstance(inner, dict) or not {"mean", "std"} <= inner.keys() or "architecture" not in config:
        return {}
    normalisation = tuple(map(float, inner["mean"])), tuple(map(float, inner["std"]))
    return {
        "model": f"timm/{config['architecture']}",
        "normalisation": normalisation,
        "classes": config.get("num_classes"),
    }


def _chosen(text: str, files: Sequence[str]) -> str:
    """The file of weights among ``files``; RobenchError where there is none, or no telling which."""
    weights = [name for name in files if name.endswith(_ENDINGS)]
    safe = [name for name in weights if name.endswith(".safetensors")]
    only: Sequence[str] = safe if len(safe) == 1 else weights if len(weights) == 1 else ()
    for name in (*_USUAL, *only):
        if name in weights:
            return name
    if not weights:
        raise RobenchError(f"{text} holds no weights; there are {', '.join(sorted(files)[:12]) or 'no files'}")
    some = ", ".join(sorted(weights)[:8])
    raise RobenchError(f"{text} holds several files of weights, {some}; say which: hf:OWNER/REPO/FILE")


def _timm(text: str, name: str, folder: Path) -> FetchedWeights:
    try:
        models = importlib.import_module("timm.models")
    except ImportError as error:
        raise RobenchError(f"{text} needs timm; pip install robench[timm]") from error
    about = models.get_pretrained_cfg(name) if models.is_model(models.split_model_name_tag(name)[0]) else None
    if about is None or not about.has_weights:
        raise RobenchError(f"timm has no weights {name!r}; expected a name of timm.list_pretrained()")
    origin, overlay = {"source": text, "url": str(about.url or "")}, {}
    if about.hf_hub_id:
        with asking(text):
            revision = str(api().model_info(about.hf_hub_id).sha)
        origin = {"source": text, "revision": revision}
        overlay = {"hf_hub_id": f"{about.hf_hub_id}@{revision}"}
    with asking(text):
        network = models.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=folder)
    path = folder / f"{re.sub('[^A-Za-z0-9._-]', '-', name)}.safetensors"
    write_tensors(path, network.state_dict())
    said = network.pretrained_cfg
    normalisation = tuple(map(float, said["mean"])), tuple(map(float, said["std"]))
    origin["sha256"] = file_hash(path)
    return FetchedWeights(path, origin, f"timm/{said['architecture']}", normalisation, int(network.num_classes))


# --- torch hub and RobustBench


def _torchhub(text: str, rest: str, folder: Path) -> FetchedWeights:
    repository, colon, asset = rest.partition(":")
    tag, _, file = asset.rpartition("/")
    if colon and (not tag or repository.count("/") != 1 or not file.endswith(_ENDINGS)):
        raise RobenchError(
            f"{text}: an entry of torch hub runs its repository's code, which import does not; expected the file of "
            f"its weights, torchhub:OWNER/REPO:TAG/FILE (of a release) or torchhub:FILE (of download.pytorch.org)"
        )
    url = f"{GITHUB}/{repository}/releases/download/{asset}" if colon else f"{TORCH}/{rest}"
    digest = _HASHED.search(url)
    if digest is None:
        raise RobenchError(
            f"{text}: expected a name that ends with the first digits of its SHA-256, as torch hub's do "
            f"(resnet18-f37072fd.pth); else name the address, {url}#sha256=..."
        )
    path = _download(url, folder / url.rpartition("/")[2], digest[1])
    return FetchedWeights(path, {"source": text, "sha256": file_hash(path), "url": url})


def _robustbench(text: str, rest: str, folder: Path) -> FetchedWeights:
    from robench.core.models import robustbench_entry

    *where, name = rest.split("/")
    dataset, threat = where if len(where) == 2 else ("cifar10", "Linf")
    entry, classes = robustbench_entry(f"{dataset}/{threat}/{name}")
    shared = entry.get("gdrive_id")
    if not isinstance(shared, str):
        raise RobenchError(f"{text}: RobustBench names no single file of weights for it; import its files one by one")
    url = f"{DRIVE}/uc?export=download&confirm=t&id={shared}"
    path = _download(url, folder / f"{name}.pt")
    none = (0.0,) * 3, (1.0,) * 3  # its networks normalise inside, if at all
    origin = {"source": text, "sha256": file_hash(path), "url": url}
    return FetchedWeights(path, origin, f"robustbench/{dataset}/{threat}/{name}", none, classes)


_FETCHERS: dict[str, Callable[[str, str, Path], FetchedWeights]] = {
    "hf": _hub,
    "timm": _timm,
    "torchhub": _torchhub,
    "robustbench": _robustbench,
    "https": _web,
    "http": _web,
}
