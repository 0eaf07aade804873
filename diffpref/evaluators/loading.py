"""CLIP networks by the name of their weights, each loaded once."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from weakref import WeakValueDictionary

from diffpref.evaluators.base import Runtime
from diffpref.evaluators.clip import Clip, Network, placed
from diffpref.evaluators.hf_clip import load_hf_network
from diffpref.evaluators.open_clip_models import CONFIG, load_open_clip_file, load_open_clip_network
from diffpref.paths import resolve

OPEN_CLIP = "open_clip:"

_loaded: WeakValueDictionary[Hashable, Network] = WeakValueDictionary()  # as long as somebody uses them


def load_clip(weights: str, runtime: Runtime | None = None) -> Clip:
    """A CLIP with the rules for pixels and text that its publisher states.

    Args:
        weights: folder or hub id of transformers' CLIPModel; ``open_clip:ARCHITECTURE/TAG``,
            ``open_clip:ARCHITECTURE/FILE`` or ``open_clip:hf-hub:ORG/NAME``; a folder of open_clip's format.
        runtime: device, dtype and batch; its own ``weights`` are not looked at.

    Raises:
        UserError: not there, damaged, no CLIP, or the device cannot do it.
    """
    runtime = runtime or Runtime()
    network = load_network(weights, runtime)
    return Clip(network, network.pixels, network.text, runtime.batch)


def load_network(weights: str, runtime: Runtime) -> Network:
    """The network of ``load_clip``: the same object for the same weights, device and dtype."""
    device = placed(runtime)
    place = resolve(weights.removeprefix(OPEN_CLIP))
    key = (weights, _stamp(place), str(device), runtime.dtype)
    network = _loaded.get(key)
    if network is None:
        only_open_clip = (
            isinstance(place, Path) and (place / CONFIG).is_file() and not (place / "config.json").is_file()
        )
        if weights.startswith(OPEN_CLIP) or only_open_clip:
            network = load_open_clip_network(weights.removeprefix(OPEN_CLIP), device, runtime)
        else:
            network = load_hf_network(weights, device, runtime)
        _loaded[key] = network
    return network


def load_checkpoint_network(path: Path, architecture: str, runtime: Runtime) -> Network:
    """The network of one open_clip checkpoint file: the same object for the same file, device and dtype."""
    device = placed(runtime)
    key = (str(path.resolve()), architecture, _stamp(path), str(device), runtime.dtype)
    network = _loaded.get(key)
    if network is None:
        network = load_open_clip_file(path, architecture, device, runtime)
        _loaded[key] = network
    return network


def _stamp(place: Path | str) -> Hashable:
    """Changes when local weights do."""
    if isinstance(place, str):
        return place
    files = sorted(place.iterdir()) if place.is_dir() else [place]
    return tuple((str(file.resolve()), file.stat().st_mtime_ns, file.stat().st_size) for file in files)
