"""What the queue does with jobs, jobs made from others, and machine types."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime, timezone

import click

from nabla.cli.output import details, note, print_json, span, table
from nabla.cli.session import Command, Session, pass_session
from nabla.cli.values import pairs, size
from nabla.cli.values import span as span_value
from nabla.hints import readable_size
from nabla.objects import Job, JobExplanation, Resources, TimelineEntry

BAR_WIDTH = 20


@click.command(cls=Command, example="nabla jobs explain js01jabc")
@click.argument("job")
@pass_session
def explain(session: Session, job: str) -> None:
    """Say why a job is in its state; of a waiting one, what it waits for and who holds it."""
    found = session.client().jobs.explain(job)
    if session.as_json:
        return print_json(found)
    click.echo(found.summary)
    if found.advice:
        click.echo(f"What to do: {found.advice}")
    if found.state == "queued":
        _show_waiting(found)


def _show_waiting(found: JobExplanation) -> None:
    click.echo()
    others = amounts(found.held_by_others)
    details(
        [
            ("priority", found.priority),
            ("in the queue", f"{found.before} of {found.waiting} waiting jobs come before it"),
            ("tried again", found.not_before),
            ("given up", found.give_up_at),
            ("other teams hold", "" if others == "nothing" else others),
        ]
    )
    click.echo()
    rows = [(r.hostname or r.node_id, amounts(r.free), amounts(r.total), r.obstacle or "fits") for r in found.nodes]
    table(("NODE", "FREE", "OF", "FOR THIS JOB"), rows, "No node has reported.")
    if found.holders:
        click.echo()
        held = [(h.job_id, h.name, h.state, amounts(h.holds), h.started_at) for h in found.holders]
        table(("HELD BY", "NAME", "STATE", "HOLDS", "STARTED"), held, "")


@click.command(cls=Command, example="nabla jobs timeline js01jabc")
@click.argument("job")
@pass_session
def timeline(session: Session, job: str) -> None:
    """Show everything that happened to a job: when, who moved it, why, and how long each state lasted."""
    found = session.client().jobs.get(job)
    if session.as_json:
        return print_json(found.timeline)
    now = None if found.job.ended else datetime.now(timezone.utc)
    rows = [
        (_clock(entry.at), entry.state, *lasted, entry.attempt or "", entry.actor, entry.cause, entry.detail)
        for entry, lasted in zip(found.timeline, _lasted(found.timeline, now))
    ]
    table(("WHEN", "STATE", "FOR", "", "ATTEMPT", "BY", "CAUSE", "DETAIL"), rows, "No history yet.")
    traces = sorted({entry.trace_id for entry in found.timeline if entry.trace_id})
    if traces:
        note(f"Trace: {', '.join(traces)}")


def _lasted(entries: Sequence[TimelineEntry], now: datetime | None) -> Iterator[tuple[str, str]]:
    """How long each entry was the newest, in words and as a bar; the last one until now, if it still is."""
    moments = [entry.at for entry in entries]
    ends = [*moments[1:], now]
    seconds = [(end - at).total_seconds() if at and end else 0.0 for at, end in zip(moments, ends)]
    longest = max(seconds, default=0.0)
    for index, lasted in enumerate(seconds):
        is_last = now is None and index == len(seconds) - 1
        bar = "█" * round(BAR_WIDTH * lasted / longest) if longest > 0 else ""
        yield ("" if is_last else _short(lasted)), bar


def _short(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s" if seconds < 120 else span(seconds)


def _clock(moment: datetime | None) -> str:
    return moment.astimezone().strftime("%m-%d %H:%M:%S.%f")[:-3] if moment else ""


@click.command(cls=Command, example="nabla jobs retry js01jabc")
@click.argument("job")
@pass_session
def retry(session: Session, job: str) -> None:
    """Run a job that has ended again, as a new job: the same code, environment and limits."""
    _made(session, session.client().jobs.retry(job))


@click.command(
    cls=Command,
    example=(
        "nabla jobs clone js01jabc --name slower --env LR=0.01",
        "nabla jobs clone js01jabc --machine-type gpu-h100-1 -- python train.py --epochs 9",
    ),
)
@click.option("--name", default="", help="Another name.")
@click.option("--env", multiple=True, metavar="KEY=VALUE", help="Set a variable over the job's own. May be repeated.")
@click.option("--cpus", type=click.FloatRange(0), default=0.0, help="Other CPU cores.")
@click.option("--memory", type=size, default="0", metavar="SIZE", help="Other memory, such as 4G.")
@click.option("--gpus", type=click.FloatRange(0), default=0.0, help="Other GPUs.")
@click.option("--machine-type", default="", metavar="TYPE", help="In place of all that the job asked for.")
@click.option("--priority", type=click.IntRange(0, 100), help="Another priority.")
@click.option("--timeout", type=span_value, metavar="TIME", help="Another limit; 0 for none.")
@click.option("--retries", type=click.IntRange(0), help="Another number of retries.")
@click.argument("job")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@pass_session
def clone(
    session: Session,
    name: str,
    env: tuple[str, ...],
    cpus: float,
    memory: int,
    gpus: float,
    machine_type: str,
    priority: int | None,
    timeout: float | None,
    retries: int | None,
    job: str,
    command: tuple[str, ...],
) -> None:
    """Run a job again with changes, as a new job. What is not said stays as it was; COMMAND comes after `--`."""
    said: dict[str, object] = {
        "name": name,
        "command": list(command),
        "env": pairs(env, "--env"),
        "machine_type": machine_type,
        "priority": priority,
        "timeout_s": timeout,
        "max_retries": retries,
    }
    changes = {field: value for field, value in said.items() if value not in (None, "", [], {})}
    resources = Resources(cpus, memory, gpus)
    _made(session, session.client().jobs.clone(job, changes, None if resources == Resources() else resources))


def _made(session: Session, job: Job) -> None:
    if session.as_json:
        return print_json(job)
    click.echo(job.id)
    note(f"Follow it with `nabla jobs attach {job.id}`.")


@click.command(cls=Command, example="nabla machines")
@pass_session
def machines(session: Session) -> None:
    """List the machine types: what each has, and how many jobs of it could start now."""
    found = session.client().machines()
    if session.as_json:
        return print_json(found)
    rows = [
        (
            kind.name,
            kind.resources.cpu_count,
            readable_size(kind.resources.memory_bytes) if kind.resources.memory_bytes else "",
            f"{kind.resources.gpu_count:g} {kind.resources.gpu_model}".strip() if kind.resources.gpu_count else "none",
            kind.startable or "none",
            ", ".join(kind.hostnames) or "none",
        )
        for kind in found
    ]
    empty = "No node has reported yet, so no machine type is known. See `nabla status`."
    table(("TYPE", "CPUS", "MEMORY", "GPUS", "FREE NOW", "NODES"), rows, empty)


def amounts(resources: Resources) -> str:
    """ "2 CPUs, 4 GB, 1 H100 GPU"; nothing where there is none."""
    cpus, memory, gpus = resources.cpu_count, resources.memory_bytes, resources.gpu_count
    gpu = f"{gpus:g} {resources.gpu_model} GPU".replace("  ", " ") + ("" if gpus == 1 else "s")
    parts = ((cpus, f"{cpus:g} CPU{'' if cpus == 1 else 's'}"), (memory, readable_size(memory)), (gpus, gpu))
    return ", ".join(text for wish, text in parts if wish) or "nothing"
