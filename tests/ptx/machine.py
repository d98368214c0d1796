"""Runs PTX on the CPU with NumPy: the instructions that methods/sparsert writes, for all threads at once.

Threads that took the same way so far go on together as one ``_Group`` whose registers are arrays.  What a GPU leaves
undefined is refused: reading a register that was never written, memory outside of the tensors handed over or not
aligned, shared memory that nobody wrote or that another thread touches between the same two barriers, shared memory
that was filled for a turn of a barrier which the thread has not waited for, a barrier that not all threads reach, a
``.uni`` or ``.aligned`` instruction that a warp reaches in part.  Who goes on next, of those that can, is drawn.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ptx.arithmetic import ARITHMETIC, SHARED_WINDOW, Array
from ptx.program import Fault, Function, Instruction, parse

SEED = 0
"""Of who goes on next."""
ARRIVALS = (
    "mbarrier.arrive.shared::cta.b64",
    "mbarrier.arrive.expect_tx.shared::cta.b64",
    "mbarrier.arrive.release.cluster.shared::cluster.b64",
)
WAITS = tuple(f"mbarrier.try_wait.parity.acquire.{scope}.shared::cta.b64" for scope in ("cta", "cluster"))


@dataclass(frozen=True)
class Buffer:
    """Memory at ``address``: bytes, of which only some may be read or written."""

    address: int
    memory: npt.NDArray[np.uint8]
    readable: npt.NDArray[np.bool_]
    writable: npt.NDArray[np.bool_]


@dataclass
class _Group:
    """Threads (their numbers over the whole grid) at one place of one function."""

    threads: npt.NDArray[np.int64]
    function: Function
    parameters: dict[str, Array | int]
    registers: dict[str, Array] = field(default_factory=dict)
    passed: list[Array] = field(default_factory=list)
    at: int = 0

    def part(self, chosen: npt.NDArray[np.bool_]) -> _Group:
        registers = {name: values[chosen] for name, values in self.registers.items()}
        parameters = {
            name: value[chosen] if isinstance(value, np.ndarray) else value for name, value in self.parameters.items()
        }
        return _Group(self.threads[chosen], self.function, parameters, registers, list(self.passed), self.at)


class Machine:
    """One launch of a kernel."""

    def __init__(
        self,
        text: str,
        grid: Sequence[int],
        block: Sequence[int],
        arguments: Sequence[int],
        buffers: Sequence[Buffer],
        shared_bytes: int = 0,
        cluster: int = 1,
    ) -> None:
        """``cluster``: blocks that follow each other in z, all of the grid's."""
        functions = parse(text)
        self.functions = functions
        (entry,) = [one for one in functions.values() if "reqntid" in one.directives]
        clustered = "explicitcluster" in entry.directives
        if entry.directives["reqntid"] != block[0] or clustered != (cluster > 1) or cluster not in (1, grid[2]):
            raise Fault(f"blocks of {block} threads and clusters of {cluster} are not what the kernel is written for")
        self.grid, self.block, self.cluster = grid, block, cluster
        self.buffers = buffers
        blocks = grid[0] * grid[1] * grid[2]
        self.shared = np.zeros((blocks, shared_bytes // 4), np.uint32)
        # Of every word: epoch and thread of the last store, and of the last load.
        self.stored = np.full((2, blocks, shared_bytes // 4), -1, np.int64)
        self.loaded = np.full((2, blocks, shared_bytes // 4), -1, np.int64)
        self.epoch = np.zeros(blocks, np.int64)
        threads = np.arange(blocks * block[0])
        # Of every word that is a barrier: arrivals of a turn, those and the bytes that it still waits for, turns that
        # are over.  Of every other: the barrier that says when it is there, and in which turn.
        self.count = np.full((blocks, shared_bytes // 4), -1, np.int64)
        self.pending, self.bytes, self.turn = (np.zeros_like(self.count) for _ in range(3))
        self.guard, self.guard_turn = np.full_like(self.count, -1), np.zeros_like(self.count)
        # Of every barrier (its word): how many of its turns each thread has waited for.
        self.seen: dict[int, npt.NDArray[np.int64]] = {}
        self.draw = np.random.default_rng(SEED)
        self.arrived, self.waited = np.zeros(len(threads), np.int64), np.zeros(len(threads), np.int64)
        self.exited = np.zeros(len(threads), np.bool_)
        self.ready = [_Group(threads, entry, dict(zip(entry.parameters, arguments, strict=True)))]
        self.parked: list[tuple[str, _Group]] = []
        self.steps = 0

    def run(self) -> None:
        """To the end of every thread.

        Raises:
            Fault: with the line of the text.
        """
        with np.errstate(all="ignore"):
            while self.ready or self.parked:
                while self.ready:
                    self._advance(self.ready.pop(int(self.draw.integers(len(self.ready)))))
                self._release()

    def _advance(self, group: _Group) -> None:
        while True:
            if group.at >= len(group.function.code):
                raise Fault(f"{group.function.name} ends without an exit")
            instruction = group.function.code[group.at]
            group.at += 1
            self.steps += 1
            try:
                if not self._step(group, instruction):
                    return
            except Fault as fault:
                raise Fault(f"line {instruction.line}, {instruction.name}: {fault}") from None

    def _release(self) -> None:
        """Let all go on that wait at a barrier, if all are there."""
        over = [
            (kind == "count" and self._over(group, group.function.code[group.at]).any()) for kind, group in self.parked
        ]
        if any(over):
            self.ready = [group for (_, group), one in zip(self.parked, over, strict=True) if one]
            self.parked = [parked for parked, one in zip(self.parked, over, strict=True) if not one]
            return
        counting = [parked for parked in self.parked if parked[0] == "count"]
        self.parked = [parked for parked in self.parked if parked[0] != "count"]
        if counting and not self.parked:
            raise Fault("a barrier waits for arrivals or bytes that never come")
        kinds = {kind for kind, _ in self.parked}
        waiting = np.zeros(len(self.exited), np.bool_)
        for _, group in self.parked:
            waiting[group.threads] = True
        per_block = self.block[0]
        blocks = waiting.reshape(-1, per_block)
        if "cluster" in kinds:
            # Blocks of a cluster follow each other in z, the slowest dimension.
            blocks = blocks.reshape(self.cluster, -1, per_block).swapaxes(0, 1).reshape(-1, self.cluster * per_block)
            arrived = self.arrived.reshape(self.cluster, -1, per_block)
            if (arrived.max(axis=(0, 2)) != arrived.min(axis=(0, 2))).any():
                raise Fault("a cluster's barrier waits for threads that never arrive")
        if len(kinds) > 1 or (blocks.any(1) & ~blocks.all(1)).any():
            raise Fault(f"not all threads of a block reach the barrier: {sorted(kinds)}")
        self.epoch += 1
        self.ready, self.parked = [group for _, group in self.parked], counting

    # -- one instruction --------------------------------------------------------------------------------------
    def _step(self, group: _Group, instruction: Instruction) -> bool:
        """Whether the group goes on."""
        name, operands = instruction.name, instruction.operands
        guard = self._read(group, instruction.guard) if instruction.guard else None
        if name == "bra":
            return self._branch(group, guard, operands[0])
        if name == "brx.idx.uni":
            return self._indexed(group, self._read(group, operands[0]), group.function.tables[operands[1]])
        if name.startswith("mbarrier"):
            return self._barrier(group, name, operands, guard)
        if name.startswith("cp.async.bulk"):
            self._bulk(group, name, operands, guard)
            return True
        if name == "bar.warp.sync":
            self._whole_warps(group)
            return True
        if guard is not None and not name.startswith("ld.global"):
            raise Fault("only branches, barriers and loads are guarded here")
        if name == "exit":
            self.exited[group.threads] = True
            return False
        if name == "call.uni":
            self._whole_warps(group)
            function = self.functions[operands[0]]
            if "noreturn" not in function.directives:
                raise Fault(f"{function.name} returns")
            parameters: dict[str, Array | int] = dict(zip(function.parameters, group.passed, strict=True))
            self.ready.append(_Group(group.threads, function, parameters))
            return False
        if name in ("bar.sync", "barrier.sync", "barrier.cluster.wait.aligned"):
            self._whole_warps(group)
            cluster = "cluster" in name
            self.waited[group.threads] += cluster
            if (self.arrived < self.waited)[group.threads].any():
                raise Fault("waits for a cluster without having arrived")
            self.parked.append(("cluster" if cluster else "block", group))
            return False
        if name in ("barrier.cluster.arrive.aligned", "barrier.cluster.arrive.relaxed.aligned"):
            self._whole_warps(group)
            if (self.arrived > self.waited)[group.threads].any():
                raise Fault("arrives twice")
            self.arrived[group.threads] += 1
            return True
        if name in ("griddepcontrol.wait", "griddepcontrol.launch_dependents", "fence.mbarrier_init.release.cluster"):
            return True
        if name.startswith("ld.param"):
            value = group.parameters[operands[1][0]]
            self._write(group, operands[0], np.broadcast_to(np.asarray(value), len(group.threads)))
        elif name.startswith("st.param"):
            at = int(operands[0][0][1:])
            if at == 0:
                group.passed = []
            group.passed.append(self._read(group, operands[1]))
        elif name.startswith("ld.global"):
            self._load_global(group, name, operands, guard)
        elif name.startswith("st.global"):
            self._store_global(group, name, operands)
        elif name.startswith("ld.shared"):
            self._shared(group, name, operands[1], operands[0], load=True)
        elif name.startswith("st.shared"):
            self._shared(group, name, operands[0], operands[1], load=False)
        elif name.startswith("st.async"):
            self._shared(group, name, operands[0], operands[1], load=False, barrier=operands[2])
        elif name == "mov.b32" and isinstance(operands[0], tuple):
            word = self._read(group, operands[1])
            for half, shift in zip(operands[0], (0, 16), strict=True):
                self._write(group, half, (word >> np.uint32(shift)).astype(np.uint16))
        else:
            sources = [self._read(group, operand) for operand in operands[1:]]
            if name not in ARITHMETIC:
                raise Fault("is not an instruction that this machine knows")
            self._write(group, operands[0], ARITHMETIC[name](*sources))
        return True

    def _branch(self, group: _Group, guard: Array | None, label: str) -> bool:
        target = group.function.labels[label]
        if guard is None or guard.all():
            group.at = target
            return True
        if not guard.any():
            return True
        taken = group.part(guard)
        taken.at = target
        self.ready += [taken, group.part(~guard)]
        return False

    def _indexed(self, group: _Group, index: Array, labels: list[str]) -> bool:
        for chosen in np.unique(index):
            if chosen >= len(labels):
                raise Fault(f"there is no branch {chosen}")
            part = group.part(index == chosen)
            self._whole_warps(part)
            part.at = group.function.labels[labels[chosen]]
            self.ready.append(part)
        return False

    def _whole_warps(self, group: _Group) -> None:
        warps = np.bincount(group.threads // 32)
        if ((warps != 0) & (warps != 32)).any():
            raise Fault("is reached by a part of a warp")

    # -- registers --------------------------------------------------------------------------------------------
    def _kind(self, group: _Group, register: str) -> Any:
        kind = group.function.kinds.get(register.rstrip("0123456789"))
        if kind is None:
            raise Fault(f"{register} is not declared")
        return kind

    def _read(self, group: _Group, operand: Any) -> Any:
        if not isinstance(operand, str):
            return operand
        if operand in group.registers:
            return group.registers[operand]
        x, _, _ = self.grid
        block = group.threads // self.block[0]
        special: dict[str, Callable[[], Array]] = {
            "%tid.x": lambda: group.threads % self.block[0],
            "%ctaid.x": lambda: block % x,
            "%ctaid.y": lambda: block // x % self.grid[1],
            "%ctaid.z": lambda: block // x // self.grid[1],
            "%nctaid.x": lambda: np.full(len(group.threads), x),
            "sums": lambda: np.zeros(len(group.threads)),
        }
        if operand in special:
            return special[operand]().astype(np.uint32)
        raise Fault(f"{operand} is read before it is written")

    def _write(self, group: _Group, register: str, values: Any) -> None:
        kind, values = self._kind(group, register), np.asarray(values)
        if values.dtype != kind:
            if values.dtype.kind == "f" or kind is np.float32 or kind is np.bool_:
                if values.dtype.itemsize != np.dtype(kind).itemsize:
                    raise Fault(f"{register} does not hold what is written to it")
                values = values.view(kind)
            else:
                values = values.astype(kind)
        group.registers[register] = values if values.ndim else np.full(len(group.threads), values)

    # -- memory -----------------------------------------------------------------------------------------------
    def _places(
        self, addresses: Array, aligned: int, allowed: str, size: int = 0
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        """Memory of the buffer that all ``addresses`` lie in, and indices ``[threads, size]``."""
        size = size or aligned
        if (addresses % aligned).any():
            raise Fault(f"an address is no multiple of {aligned}")
        low, high = int(addresses.min()), int(addresses.max()) + size
        for buffer in self.buffers:
            if buffer.address <= low and high <= buffer.address + len(buffer.memory):
                first = (addresses - np.uint64(buffer.address)).astype(np.int64)
                places = first[:, None] + np.arange(size)
                if not getattr(buffer, allowed)[places].all():
                    raise Fault(f"touches memory that is not {allowed}")
                return buffer.memory, places
        raise Fault(f"touches memory from {low:#x} to {high:#x}, where no buffer is")

    @staticmethod
    def _size(name: str) -> tuple[int, int]:
        """Bytes of an element, and elements."""
        vector = re.search(r"\.v(\d)", name)
        return int(name[-2:]) // 8, int(vector[1]) if vector else 1

    def _addresses(self, group: _Group, where: tuple[str, int]) -> Array:
        base = self._read(group, where[0])
        return base + base.dtype.type(where[1] % (1 << 8 * base.dtype.itemsize))

    def _load_global(self, group: _Group, name: str, operands: tuple[Any, ...], guard: Array | None) -> None:
        size, count = self._size(name)
        targets = operands[0] if isinstance(operands[0], tuple) else (operands[0],)
        addresses = self._addresses(group, operands[1])
        if guard is None:
            memory, places = self._places(addresses, size * count, "readable")
            loaded = memory[places].view(f"u{size}")
            for index, target in enumerate(targets):
                self._write(group, target, np.ascontiguousarray(loaded[:, index]))
            return
        (target,) = targets
        before = np.array(self._read(group, target))
        if guard.any():
            memory, places = self._places(addresses[guard], size, "readable")
            before[guard] = memory[places].view(before.dtype)[:, 0]
        self._write(group, target, before)

    def _store_global(self, group: _Group, name: str, operands: tuple[Any, ...]) -> None:
        size, count = self._size(name)
        sources = operands[1] if isinstance(operands[1], tuple) else (operands[1],)
        if len(sources) != count:
            raise Fault(f"stores {len(sources)} registers")
        values = np.ascontiguousarray(np.stack([self._read(group, source) for source in sources], 1))
        memory, places = self._places(self._addresses(group, operands[0]), size * count, "writable")
        data = values.view(np.uint8).reshape(places.shape)
        memory[places] = data
        if (memory[places] != data).any():
            raise Fault("two threads store different values to one place")

    def _cluster_address(self, group: _Group, where: tuple[str, int]) -> tuple[npt.NDArray[np.int64], Array]:
        """Blocks and addresses in their shared memory, of addresses that name both."""
        addresses, plane = self._addresses(group, where).astype(np.int64), self.grid[0] * self.grid[1]
        rank = addresses // SHARED_WINDOW - 1
        if (rank < 0).any() or (rank >= self.cluster).any():
            raise Fault("is no address of the cluster")
        return group.threads // self.block[0] % plane + rank * plane, addresses % SHARED_WINDOW

    def _shared(
        self,
        group: _Group,
        name: str,
        where: tuple[str, int],
        registers: Any,
        *,
        load: bool,
        barrier: tuple[str, int] | None = None,
    ) -> None:
        size, count = self._size(name)
        registers = registers if isinstance(registers, tuple) else (registers,)
        addresses, block = self._addresses(group, where).astype(np.int64), group.threads // self.block[0]
        guard = np.full(len(group.threads), -1)
        if barrier is not None:
            block, addresses = self._cluster_address(group, where)
            other, place = self._cluster_address(group, barrier)
            if (other != block).any() or (self.count[block, place // 4] < 0).any():
                raise Fault("counts at no barrier of the block it stores to")
            guard = place // 4
        if (addresses % (size * count)).any() or (addresses + size * count > 4 * self.shared.shape[1]).any():
            raise Fault("an address in shared memory is beyond the end or not aligned")
        epoch, me = self.epoch[block], group.threads
        if size < 4 and (not load or count > 1):
            raise Fault("stores halves, or loads several")
        for index, register in enumerate(registers):
            word = addresses // 4 + index
            if (self.count[block, word] >= 0).any() or (self.count[block, word & ~1] >= 0).any():
                raise Fault("touches a barrier")
            stored, loaded, guarded = self.stored[:, block, word], self.loaded[:, block, word], self.guard[block, word]
            if (guarded < 0).all() and ((stored[0] == epoch) & (stored[1] != me)).any():
                raise Fault("another thread stores there between the same barriers")
            if load:
                if (stored[0] < 0).any() or (self._turns_seen(guarded, me) <= self.guard_turn[block, word]).any():
                    raise Fault("nobody stored there, or its barrier was not waited for")
                values = self.shared[block, word]
                if size < 4:
                    values = (values >> (8 * (addresses % 4)).astype(np.uint32)).astype(np.uint16)
                self._write(group, register, values)
                self.loaded[:, block, word] = epoch, me
                continue
            if (guarded >= 0).any() or ((loaded[0] == epoch) & (loaded[1] != me)).any():
                raise Fault("another thread loads there, or stored there, between the same barriers")
            self.shared[block, word] = self._read(group, register).view(np.uint32)
            self.stored[:, block, word] = epoch, me
            self.guard[block, word] = guard
            self.guard_turn[block, word] = np.where(guard < 0, 0, self.turn[block, guard])
        if barrier is not None:
            np.subtract.at(self.bytes, (block, guard), size * count)
            self._turn_over(block, guard)

    def _turns_seen(self, guarded: npt.NDArray[np.int64], threads: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Of the barriers that guard words, how many turns threads have waited for; enough where there is none."""
        turns = np.full(len(threads), np.iinfo(np.int64).max)
        for word in np.unique(guarded[guarded >= 0]):
            chosen = guarded == word
            turns[chosen] = self.seen[int(word)][threads[chosen]] if int(word) in self.seen else 0
        return turns

    def _turn_over(self, block: npt.NDArray[np.int64], word: npt.NDArray[np.int64]) -> None:
        """Barriers that have what they waited for begin their next turn."""
        for place in {(int(b), int(w)) for b, w in zip(block, word, strict=True)}:
            if self.pending[place] < 0:
                raise Fault("more arrivals than there should be")
            if self.pending[place] == 0 and self.bytes[place] == 0:
                self.turn[place] += 1
                self.pending[place] = self.count[place]

    def _bulk(self, group: _Group, name: str, operands: tuple[Any, ...], guard: Array | None) -> None:
        """A copy from global to shared memory, done at once, that counts its bytes at a barrier."""
        size, plane = int(operands[2]), self.grid[0] * self.grid[1]
        several = name.endswith(".multicast::cluster")
        chosen = np.ones(len(group.threads), np.bool_) if guard is None else guard
        to, full = (self._addresses(group, operands[at]).astype(np.int64) for at in (0, 3))
        source = self._addresses(group, operands[1])
        mates = self._read(group, operands[4]) if several else np.zeros(len(group.threads), np.uint16)
        for at in np.flatnonzero(chosen):
            own = int(group.threads[at]) // self.block[0]
            if to[at] % 16 or int(source[at]) % 16 or size % 16 or to[at] + size > 4 * self.shared.shape[1]:
                raise Fault("copies what is no multiple of 16 bytes, or beyond the end of shared memory")
            memory, places = self._places(source[at : at + 1], 16, "readable", size)
            words = np.ascontiguousarray(memory[places[0]]).view(np.uint32)
            blocks = (
                [own % plane + rank * plane for rank in range(16) if int(mates[at]) >> rank & 1] if several else [own]
            )
            for block in blocks:
                where, barrier = (block, slice(to[at] // 4, (to[at] + size) // 4)), (block, int(full[at]) // 4)
                if self.count[barrier] < 0 or (self.count[where] >= 0).any():
                    raise Fault("counts at no barrier, or copies over one")
                self.shared[where] = words
                self.stored[(0, *where)] = self.epoch[block]
                self.guard[where], self.guard_turn[where] = barrier[1], self.turn[barrier]
                self.bytes[barrier] -= size
                self._turn_over(np.array([block]), np.array([barrier[1]]))

    def _barrier(self, group: _Group, name: str, operands: tuple[Any, ...], guard: Array | None) -> bool:
        """Barriers that count."""
        where = operands[0] if name.startswith("mbarrier.init") else operands[1]
        chosen = np.ones(len(group.threads), np.bool_) if guard is None else guard
        if ".shared::cluster" in name:
            block, address = self._cluster_address(group, where)
        else:
            block, address = group.threads // self.block[0], self._addresses(group, where).astype(np.int64)
        block, word = block[chosen], address[chosen] // 4
        if name == "mbarrier.init.shared.b64":
            if (word % 2).any() or (self.count[block, word] >= 0).any():
                raise Fault("two barriers in one place, or not aligned")
            self.count[block, word] = self.pending[block, word] = operands[1]
            return True
        if (self.count[block, word] < 0).any():
            raise Fault("there is no barrier")
        if name.startswith("mbarrier.arrive"):
            if name not in ARRIVALS:
                raise Fault("is not an instruction that this machine knows")
            np.subtract.at(self.pending, (block, word), 1)
            if "expect_tx" in name:
                np.add.at(self.bytes, (block, word), operands[2])
            self._turn_over(block, word)
            return True
        if name not in WAITS or operands[2] not in (0, 1):
            raise Fault("is not an instruction that this machine knows")
        over = self._over(group, group.function.code[group.at - 1])
        if not over.all():
            waits = group.part(~over)
            waits.at -= 1
            self.parked.append(("count", waits))
            if not over.any():
                return False
            goes = group.part(over)
            goes.at -= 1
            self.ready.append(goes)
            return False
        for one in np.unique(word):
            seen = self.seen.setdefault(int(one), np.zeros(len(self.exited), np.int64))
            own = word == one
            seen[group.threads[own]] = self.turn[block[own], one]
        self._write(group, operands[0], over)
        return True

    def _over(self, group: _Group, instruction: Instruction) -> npt.NDArray[np.bool_]:
        """Of threads that wait: whether the turn of that parity is over."""
        _, where, parity = instruction.operands
        word = self._addresses(group, where).astype(np.int64) // 4
        over: npt.NDArray[np.bool_] = self.turn[group.threads // self.block[0], word] % 2 != parity
        return over
