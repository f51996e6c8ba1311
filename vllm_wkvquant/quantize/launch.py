"""Starts a run: in this process, or with workers that are processes of this host or Ray actors.

Several workers find each other through a store in this process, and tell it what to show. Where one fails, all end.
"""

import multiprocessing
import os
import queue
import signal
import socket
import threading
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.distributed as dist

from vllm_wkvquant.config import ConfigError
from vllm_wkvquant.quantize.pipeline import Announce, Progress, quantize
from vllm_wkvquant.quantize.plan import Settings, check_workers
from vllm_wkvquant.quantize.workers import Workers

POLL_SECONDS = 1.0
CONNECT_SECONDS = 5.0  # to a Ray cluster; Ray itself goes on trying for minutes


def run(
    settings: Settings,
    progress: Progress = lambda done, total, note: None,
    announce: Announce = lambda estimate: None,
) -> dict[str, Any]:
    """`pipeline.quantize` with as many workers as `settings` asks for, started and ended here."""
    if settings.workers == 1 and settings.ray is None:
        return quantize(settings, progress, announce)
    check(settings)
    crew: Crew = Processes(settings) if settings.ray is None else Actors(settings)
    show: dict[str, Callable[..., None]] = {"progress": progress, "announce": announce}
    try:
        while True:
            try:
                kind, *values = crew.events.get(timeout=POLL_SECONDS)
            except queue.Empty:
                crew.check()
                continue
            if kind == "report":
                return values[0]
            if kind == "error":
                crew.check()  # an error may be for want of a worker that was killed
                raise values[0]
            show[kind](*values)
    finally:
        crew.stop()


def check(settings: Settings) -> None:
    """Raise ConfigError for what several workers cannot be."""
    if settings.device not in ("cpu", "cuda"):
        raise ConfigError(f"--device {settings.device}: workers choose their GPUs themselves; use --device cuda")
    if settings.device == "cuda" and settings.ray is None and settings.workers > torch.cuda.device_count():
        raise ConfigError(f"--workers {settings.workers}: torch sees {torch.cuda.device_count()} GPUs here")
    check_workers(settings.workers, settings.samples + settings.own_samples)
    if settings.ray not in (None, "auto", "local"):
        check_address(settings.ray)


def check_address(ray: str) -> None:
    """Raise ConfigError where nothing listens at the address of a Ray cluster."""
    host, _, port = ray.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"--ray {ray} is not host:port, auto or local")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"--ray {ray}: {error}; is `ray start --head` running there, and is this its address and port?"
        ) from error


def work(rank: int, gpu: int, store: tuple[str, int], settings: Settings, events: Any) -> None:
    """A worker's life. gpu: index among those it sees; store: address of `dist.TCPStore`; events: queue to `run`."""
    try:
        cuda = settings.device == "cuda"
        if cuda:
            torch.cuda.set_device(gpu)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=dist.TCPStore(*store, is_master=False),
            rank=rank,
            world_size=settings.workers,
        )
        tell = events.put if rank == 0 else lambda event: None
        report = quantize(
            settings,
            lambda *values: tell(("progress", *values)),
            lambda *values: tell(("announce", *values)),
            Workers(rank, settings.workers),
        )
        tell(("report", report))
        dist.destroy_process_group()
    except Exception as error:
        known = isinstance(error, ConfigError)
        events.put(("error", error if known else RuntimeError(f"worker {rank}: {traceback.format_exc()}")))
        threading.Event().wait()  # its connections stay, so that the others' errors are not first; `run` ends all


def end_with_parent() -> None:
    """Wait for the end of the process that started this one, and end, too."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class Crew(Protocol):
    """Started workers."""

    events: Any

    def check(self) -> None:
        """Raise ConfigError where one has ended that should not."""

    def stop(self) -> None:
        """End all."""


class Processes:
    """Workers on this host; each has a GPU of its own or an equal share of the threads."""

    def __init__(self, settings: Settings) -> None:
        context = multiprocessing.get_context("spawn")
        self.events = context.Queue()
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        threads = max(1, torch.get_num_threads() // settings.workers)
        address = "127.0.0.1", self._store.port
        self._processes = [
            context.Process(target=self.work, args=(threads, rank, rank, address, settings, self.events), daemon=True)
            for rank in range(settings.workers)
        ]
        for process in self._processes:
            process.start()

    @staticmethod
    def work(threads: int, *args: Any) -> None:
        """`work`, and an end with the process that started it."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, which sends it to all: `run` ends the workers
        threading.Thread(target=end_with_parent, daemon=True).start()
        torch.set_num_threads(threads)
        work(*args)

    def check(self) -> None:
        """Raise ConfigError where one has ended that should not."""
        for rank, process in enumerate(self._processes):
            if process.exitcode:
                raise ConfigError(
                    f"worker {rank} ended with status {process.exitcode} (-9: killed, often for want of memory); "
                    f"what is done goes on with --resume"
                )

    def stop(self) -> None:
        """End all."""
        for process in self._processes:
            process.kill()
            process.join()


class Actors:
    """Ray actors, on any hosts of the cluster; each has a GPU of its own or a CPU."""

    def __init__(self, settings: Settings) -> None:
        if settings.ray == "local":
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster of our own tells nobody of itself
        try:
            import ray
            from ray.util.queue import Queue
        except ImportError as error:
            raise ConfigError("--ray needs the package ray: pip install 'vllm-wkvquant[ray]'") from error
        self._ray, self._own = ray, not ray.is_initialized()
        if self._own:
            try:
                ray.init(settings.ray, log_to_driver=False)
            except (ConnectionError, ray.exceptions.RayError) as error:
                raise ConfigError(f"--ray {settings.ray}: {error}") from error
        kind = "GPU" if settings.device == "cuda" else "CPU"
        there = int(ray.cluster_resources().get(kind, 0))
        if there < settings.workers:
            self._leave()
            raise ConfigError(f"--workers {settings.workers}: the Ray cluster has {there} {kind}s")
        address = ray.util.get_node_ip_address()
        self._store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False)
        self.events = Queue(actor_options={"num_cpus": 0})
        actor: Any = ray.remote(num_cpus=1, num_gpus=int(kind == "GPU"))(Actor)
        absolute = {name: getattr(settings, name).absolute() for name in ("model", "out", "calib_text")}
        settings = replace(settings, **absolute)
        self._actors = [actor.remote() for _ in range(settings.workers)]
        self._runs = [
            a.work.remote(rank, 0, (address, self._store.port), settings, self.events)
            for rank, a in enumerate(self._actors)
        ]

    def check(self) -> None:
        """Raise ConfigError where one has ended that should not."""
        ended, _ = self._ray.wait(self._runs, num_returns=len(self._runs), timeout=0)
        try:
            self._ray.get(ended)
        except self._ray.exceptions.RayError as error:
            raise ConfigError(f"a worker ended: {error}; what is done goes on with --resume") from error

    def stop(self) -> None:
        """End all."""
        for actor in self._actors:
            self._ray.kill(actor)
        self.events.shutdown(force=True)
        self._leave()

    def _leave(self) -> None:
        if self._own:
            self._ray.shutdown()


class Actor:
    """A worker of Ray's."""

    def work(self, *args: Any) -> None:
        """`work`."""
        work(*args)
