"""Receives broadcast weights in an SGLang that the launcher started: into the parameters themselves, as one stream.

SGLang receives a bucket into new memory, then loads it in the same thread, and only then asks for the next. Loading is
a copy, and new memory costs as much as one: the kernel clears it. Here

- the first time that a tensor comes, loading is watched (``Places.load``). Where it is nothing but one copy of the
  whole tensor into one piece of a parameter, such as q_proj's rows of a fused qkv_proj, that piece is its place, and
  from then on the tensor is received there;
- what has no place (a shard of a tensor, an engine of several ranks) is received into new memory, at most
  ``WINDOW_BYTES`` of it at once, and loaded while the tensors after it are under way.

So one request may ask for the whole model, its receives are posted as far as there is memory for them, and rank 0
sends to each rank instead of broadcasting. An update that breaks leaves the engine with some new and some old weights,
as SGLang's own does. Loaded by path, in the engine's environment: it imports nothing of this package.
"""

import weakref
from collections import deque

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WINDOW_BYTES = 256 << 20  # of received tensors that are not loaded yet
MARK = "Streams weights."  # in the answer to /init_weights_update_group: says that one request may ask for everything
STREAM = "megatron_opd_stream"  # for a load format: each tensor is sent, and not broadcast

_places = weakref.WeakKeyDictionary()  # of each model


class Places:
    """Where the tensors of each name end up in a model."""

    def __init__(self, model) -> None:
        self._model = weakref.ref(model)
        self._known = {}  # name -> its place; None: it has none

    def of(self, names, dtypes, shapes) -> list:
        """A tensor for each name to be received into, None where there is no such place (any longer)."""
        live = {_memory(parameter) for parameter in self._model().parameters()}
        found = []
        for name, dtype, shape in zip(names, dtypes, shapes, strict=True):
            place = self._known.get(name)
            if place is not None and (place.dtype != dtype or place.shape != shape or _memory(place) not in live):
                del self._known[name]  # the parameter was replaced: watch the next time
                place = None
            found.append(place)
        return found

    def load(self, tensors, load) -> None:
        """``load`` the named tensors, watching where those go that are not known."""
        if all(name in self._known for name, _ in tensors):
            load(tensors)
            return
        with Watch(tensors) as watch:
            load(tensors)
        self._known |= watch.places()


class Watch(TorchDispatchMode):
    """Sees every operation on some named tensors."""

    def __init__(self, tensors) -> None:
        super().__init__()
        self._tensors = dict(tensors)
        self._names = {_memory(tensor): name for name, tensor in tensors}
        self._uses = {name: [] for name in self._tensors}  # target of each copy; None: something else

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        used = {self._names.get(_memory(leaf)) for leaf in _tensors_of((args, kwargs))} - {None}
        if function is torch.ops.aten.copy_.default and self._names.get(_memory(args[0])) is None:
            for name in used:
                self._uses[name].append(args[0].detach() if self._is_whole(name, args[1]) else None)
        else:
            views = not function._schema.is_mutable and all(
                _memory(leaf) in self._names for leaf in tree_leaves(result)
            )
            for name in () if views else used:
                self._uses[name].append(None)
        return result

    def _is_whole(self, name, source) -> bool:
        tensor = self._tensors[name]
        return source.shape == tensor.shape and source.stride() == tensor.stride() and source.dtype == tensor.dtype

    def places(self) -> dict:
        """Place of each name, None where loading was more than one copy of it all, or was changed afterwards."""
        places = {}
        for name, tensor in self._tensors.items():
            uses = self._uses[name]
            place = uses[0] if len(uses) == 1 else None
            fits = (
                place is not None
                and place.is_contiguous()
                and (place.shape, place.dtype) == (tensor.shape, tensor.dtype)
            )
            places[name] = place if fits and torch.equal(place, tensor) else None
        return places


def receive(updater, names, dtypes, shapes, group, streamed) -> list:
    """Receive and load what rank 0 of ``group`` broadcasts for each name, or, ``streamed``, sends to this rank alone.

    Nothing is left to load: an empty list.
    """
    model = updater.get_model()
    places = _places.setdefault(model, Places(model))

    def load(tensors) -> None:
        done, message = updater.load_weights_from_distributed(tensors)
        if not done:
            raise RuntimeError(message)

    load([])  # refused before anything is overwritten
    dtypes = [dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype) for dtype in dtypes]
    shapes = [torch.Size(shape) for shape in shapes]
    under_way, held = deque(), 0
    for name, dtype, shape, place in zip(names, dtypes, shapes, places.of(names, dtypes, shapes), strict=True):
        tensor = torch.empty(shape, dtype=dtype, device=updater.device) if place is None else place
        work = group.recv([tensor], 0, 0) if streamed else dist.broadcast(tensor, 0, group, async_op=True)
        under_way.append((name, tensor, work, place is None))
        held += tensor.nbytes if place is None else 0
        if held > WINDOW_BYTES:
            held -= _load_arrived(under_way, held // 2, places, load)
    _load_arrived(under_way, held, places, load)
    return []


def _load_arrived(under_way, least, places, load) -> int:
    """Wait for the first of the tensors, until ``least`` bytes of those without a place are loaded; those bytes."""
    loose, size = [], 0
    while under_way and (size < least or not under_way[0][3]):
        name, tensor, work, is_loose = under_way.popleft()
        work.wait()
        if is_loose:
            loose.append((name, tensor))
            size += tensor.nbytes
    if loose:
        places.load(loose, load)
    return size


def _memory(value) -> int | None:
    return value.untyped_storage().data_ptr() if isinstance(value, torch.Tensor) else None


def _tensors_of(values) -> list:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def patch(module) -> None:
    """Let the ``WeightUpdater`` of SGLang's module receive like this."""
    updater = module.WeightUpdater
    receive_buckets, join = updater.receive_weights_from_distributed, updater.init_weights_update_group

    def streams(self) -> bool:
        return self.get_model_runner().spec_algorithm.is_none()  # a draft model loads what its target has received

    def receive_weights_from_distributed(self, *, names, dtypes, shapes, group_name, load_format=None):
        if load_format in (None, STREAM) and streams(self):
            group = self._model_update_group[group_name]
            return receive(self, names, dtypes, shapes, group, load_format == STREAM)
        return receive_buckets(
            self, names=names, dtypes=dtypes, shapes=shapes, group_name=group_name, load_format=load_format
        )

    def init_weights_update_group(self, *args, **kwargs):
        done, message = join(self, *args, **kwargs)
        return done, f"{message} {MARK}" if done and streams(self) else message

    updater.receive_weights_from_distributed = receive_weights_from_distributed
    updater.init_weights_update_group = init_weights_update_group
