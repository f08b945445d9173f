"""`renderfarm schedule`: the file that has somebody else's clock start a job at each tick, with the date of the tick.

renderfarm has no clock of its own. A tick renders what `{{ ds }}` of its date names, so that a tick that fires twice, or a second
time after a crash, goes on with the same output. What happens while the tick before is still being rendered, the scheduler decides
(`overlap`): skip this tick, wait until the other has ended, or allow both.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from renderfarm.config import WRITTEN_IN, Job, is_url
from renderfarm.errors import InvalidJob
from renderfarm.kubernetes import (
    APPLY,
    CLUSTER_VARIABLE,
    MAX_FILES_BYTES,
    MAX_NAME,
    MOUNT,
    TOKEN,
    Files,
    Pods,
    checked,
    kubernetes_name,
    ray_job,
    remarks,
    to_yaml,
)
from renderfarm.parcel import pack

Kind = Literal["cron", "systemd", "cronjob", "raycronjob", "airflow"]
Overlap = Literal["skip", "wait", "allow"]
# What each scheduler can do; the first is its default
OVERLAPS: dict[Kind, tuple[Overlap, ...]] = {
    "cron": ("skip", "wait", "allow"),
    "systemd": ("skip",),
    "cronjob": ("skip", "wait", "allow"),
    "raycronjob": ("allow",),
    "airflow": ("wait", "allow"),
}
WHY = {
    "systemd": "a timer whose service is still at work does not start it again",
    "raycronjob": "a RayCronJob has no policy; two dates have two outputs, so they do not harm each other",
    "airflow": "Airflow queues its runs",
}
DEADLINE_S = {"skip": 300, "wait": 86_400, "allow": 300}  # of a Kubernetes CronJob: how late a tick may still start
TODAY, DAY = '"$(date +%F)"', '"$day"'
DAYS, MONTHS = ("Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat"), 12
_FIELDS = (("minute", 0, 59), ("hour", 0, 23), ("day of the month", 1, 31), ("month", 1, MONTHS), ("day of the week", 0, 7))
_PIECE = re.compile(r"(?P<every>\*)|(?P<first>\d{1,2})(?:-(?P<last>\d{1,2}))?")


@dataclass(frozen=True)
class Schedule:
    """Texts of files by their names, in the order in which they are to be installed, and how."""

    files: dict[str, str]
    install: str


@dataclass(frozen=True)
class Tick:
    """What a schedule starts. `at`: five fields of cron; `address`: a Ray cluster's, or its dashboard's for Ray Jobs."""

    job: Job
    file: Path
    at: str = "15 2 * * *"
    overlap: Overlap = "skip"
    sets: tuple[str, ...] = ()
    address: str | None = None
    image: str | None = None
    namespace: str | None = None
    secrets: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """As Kubernetes and systemd take it."""
        return "renderfarm-" + re.sub(r"[^a-z0-9-]+", "-", self.job.name.lower()).strip("-")[:40]

    def command(self, file: str, date: str, program: Sequence[str] = ("renderfarm",)) -> str:
        """A line for a shell. `date`: one, or what a shell makes into one."""
        words = [*program, *(["submit", file, "--wait"] if is_url(self.address or "") and not self.in_ray else ["run", file])]
        words += [word for item in self.sets for word in ("--set", item)]
        words += ["--address", self.address] if self.address else []
        return f"{shlex.join(words)} --logical-date {date}"

    @property
    def in_ray(self) -> bool:
        return (self.address or "").startswith("ray://")


def schedule(tick: Tick, kind: Kind, overlap: Overlap | None = None) -> Schedule:
    """Raises InvalidJob where the scheduler cannot do what is asked, or ticks would share one output."""
    if overlap is not None and overlap not in OVERLAPS[kind]:
        raise InvalidJob(f"--overlap {overlap}: {WHY[kind]}; for {kind} give {' or '.join(OVERLAPS[kind])}, or leave it out")
    check_cron(tick.at)
    made = {"cron": _cron, "systemd": _systemd, "cronjob": _cronjob, "raycronjob": _raycronjob, "airflow": _airflow}[kind]
    return made(Tick(**{**vars(tick), "overlap": overlap or OVERLAPS[kind][0]}))


def check_cron(text: str) -> None:
    """Raises InvalidJob for what is not five fields as every cron reads them."""
    fields = text.split()
    if len(fields) != len(_FIELDS):
        raise InvalidJob(f"--at {text!r}: give five fields: minute, hour, day of the month, month, day of the week (15 2 * * *)")
    for field, (name, least, most) in zip(fields, _FIELDS, strict=True):
        for piece in field.split(","):
            span, slash, step = piece.partition("/")
            match = _PIECE.fullmatch(span)
            numbers = [int(number) for number in (match["first"], match["last"]) if number] if match else []
            known = match is not None and all(least <= number <= most for number in numbers) and numbers == sorted(numbers)
            if not known or (slash and not (step.isdecimal() and 0 < int(step) <= most and (match["every"] or match["last"]))):  # type: ignore[index]
                raise InvalidJob(f"--at {text!r}: {piece!r} is no {name}; write a number from {least} to {most}, 1-5, 1,15, * or */2")


def _one_line(tick: Tick) -> str:
    """The command for files that end a command with its line. Raises InvalidJob where it has several."""
    command = tick.command(str(tick.file), TODAY, _program())
    if len(command.splitlines()) > 1:
        raise InvalidJob("a --set, or the job file's path, holds a line break, which these files cannot: write the value into the job file")
    return command


def _program() -> list[str]:
    """Its full path: schedulers have another PATH."""
    found = shutil.which("renderfarm")
    return [found] if found else [sys.executable, "-m", "renderfarm"]


def _heading(tick: Tick, what: str) -> str:
    same = f"# overlap: {tick.overlap}. A tick that fires twice is one run: same date, same output."
    return f"# renderfarm job {tick.job.name}: {what}\n{same}\n"


# ------------------------------------------------------------------------------------------------ this machine


def _cron(tick: Tick) -> Schedule:
    lock = shlex.quote(str(tick.file.with_name(f".{tick.name}.lock")))
    held = {"skip": f"flock -n -E 75 {lock} ", "wait": f"flock {lock} ", "allow": ""}[tick.overlap]
    log = shlex.quote(str(tick.file.with_suffix(".log")))
    line = f"{held}{_one_line(tick)} >> {log} 2>&1"
    escaped = line.replace("%", "\\%")  # cron takes a bare one for the end of the line
    text = _heading(tick, "each tick renders its own date, in this machine's time") + f"{tick.at}  {escaped}\n"
    return Schedule({f"{tick.name}.cron": text}, f"(crontab -l; cat {tick.name}.cron) | crontab -")


def _systemd(tick: Tick) -> Schedule:
    escaped = _one_line(tick).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    service = f"""{_heading(tick, "the work of one tick")}[Unit]
Description=renderfarm job {tick.job.name}
After=network-online.target
Wants=network-online.target

[Service]
Type=oneshot
WorkingDirectory={str(tick.file.parent).replace("%", "%%")}
ExecStart=/bin/sh -c "{escaped}"
# longer than the time that parts in flight have to finish
TimeoutStopSec=60
"""
    timer = f"""{_heading(tick, "its clock")}[Unit]
Description=Ticks of the renderfarm job {tick.job.name}

[Timer]
OnCalendar={on_calendar(tick.at)}
# a tick that was missed while the machine was off is made up for at its start, under that day's date
Persistent=true

[Install]
WantedBy=timers.target
"""
    files = {f"{tick.name}.service": service, f"{tick.name}.timer": timer}
    return Schedule(files, f"put both into /etc/systemd/system, then systemctl enable --now {tick.name}.timer")


def on_calendar(at: str) -> str:
    """Five fields of cron as systemd writes a time. Raises InvalidJob for the one thing that it cannot say."""
    minute, hour, day, month, weekday = at.split()
    if day != "*" and weekday != "*":
        raise InvalidJob(f"--at {at!r}: cron means either of the two days, which a systemd timer cannot say; give one of them")
    days = "" if weekday == "*" else f"{','.join(_weekdays(weekday))} "
    return f"{days}*-{_part(month, 1)}-{_part(day, 1)} {_part(hour, 0)}:{_part(minute, 0)}:00"


def _part(field: str, least: int) -> str:
    pieces = [piece.partition("/") for piece in field.split(",")]
    said = [(f"{least}" if span == "*" and step else span.replace("-", "..")) + slash + step for span, slash, step in pieces]
    return ",".join(said)


def _weekdays(field: str) -> list[str]:
    found: list[int] = []
    for piece in field.split(","):
        span, _, step = piece.partition("/")
        first, _, last = ("0-6" if span == "*" else span).partition("-")
        found += range(int(first), int(last or first) + 1, int(step or 1))
    return [DAYS[day] for day in sorted({day % 7 for day in found})]


# ------------------------------------------------------------------------------------------------ Kubernetes

# Jobs are named CRONJOB-MINUTES, minutes since 1970 of the tick, however late they start
_DAY_OF_TICK = (
    'minutes="${JOB_NAME##*-}"; '
    'case "$minutes" in ""|*[!0-9]*) day="$(date -u +%F)";; *) day="$(date -u -d "@$((minutes * 60))" +%F)";; esac; '
)
# RayJobs are, too (KubeRay 1.7), and a RayCluster has its RayJob's name and five letters more; before that, the day on which it starts
_RUN_FILE = "run.sh"
_RUN_OF_TICK = f"""tick="${{{CLUSTER_VARIABLE}%-*}}"
minutes="${{tick##*-}}"
case "$minutes" in
  {"[0-9]" * 8}) day="$(date -u -d "@$((minutes * 60))" +%F)";;
  *) day="$(date -u +%F)";;
esac
"""
_MAX_CRON_NAME = MAX_NAME - len("-29772135")
_TOKEN_ENV: list[dict[str, Any]] = [
    TOKEN,
    {"name": "RAY_AUTH_TOKEN", "valueFrom": {"secretKeyRef": {"name": "renderfarm-ray", "key": "token", "optional": True}}},
]


def _when_due(tick: Tick, pods: Pods, kind: tuple[str, str], **spec: Any) -> dict[str, Any]:
    """`kind`: its API's version, and its name there."""
    timed = {"schedule": tick.at, "timeZone": "Etc/UTC", **spec}
    return {"apiVersion": kind[0], "kind": kind[1], "metadata": pods.metadata(_cron_name(tick)), "spec": timed}


def _cron_name(tick: Tick) -> str:
    return kubernetes_name(tick.job.name, _MAX_CRON_NAME)


def _pods(tick: Tick) -> Pods:
    return checked(Pods(tick.image or "", tick.namespace, tick.secrets))


def _files(tick: Tick, **more: str) -> Files:
    """The job file as it is, whose paths begin where it lies, and what it names below its own folder."""
    beside = {name: path.read_bytes() for name, path in _beside(tick).items()}
    return Files(_cron_name(tick), {"job.yaml": tick.file.read_bytes(), **{name: text.encode() for name, text in more.items()}, **beside})


def _beside(tick: Tick) -> dict[str, Path]:
    """By their names there: manifests and lists of words that are small enough to go with it."""
    folder = tick.file.parent
    found = pack(tick.job, MAX_FILES_BYTES).files.values()
    return {path.relative_to(folder).as_posix(): path for path in found if path.is_relative_to(folder)}


def _written_in(tick: Tick) -> str:
    """A tick is the run that the same job and date are here."""
    return f"{MOUNT}:{tick.file.parent}"


def _cronjob(tick: Tick) -> Schedule:
    if tick.image is None or not is_url(tick.address or "") or tick.in_ray:
        raise InvalidJob("cronjob: give --image (one with renderfarm in it) and --address http://RAY-HEAD:8265, to which each tick submits")
    pods, files = _pods(tick), _files(tick)
    script = f"{_DAY_OF_TICK}exec {tick.command(f'{MOUNT}/job.yaml', DAY)}"
    label = {"fieldRef": {"fieldPath": "metadata.labels['batch.kubernetes.io/job-name']"}}
    container = {
        "name": "submit",
        "image": tick.image,
        "command": ["sh", "-c", script],
        **pods.environment({"name": "JOB_NAME", "valueFrom": label}, {"name": WRITTEN_IN, "value": _written_in(tick)}, *_TOKEN_ENV),
        "volumeMounts": [{"name": "job", "mountPath": MOUNT}],
    }
    never_again = {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2, 3, 4, 5]}}  # as `renderfarm --help` has them
    pod = {"restartPolicy": "Never", "containers": [container], "volumes": [files.volume()]}
    cronjob = _when_due(
        tick,
        pods,
        ("batch/v1", "CronJob"),
        concurrencyPolicy="Allow" if tick.overlap == "allow" else "Forbid",
        startingDeadlineSeconds=DEADLINE_S[tick.overlap],
        jobTemplate={"spec": {"backoffLimit": 3, "podFailurePolicy": {"rules": [never_again]}, "template": {"spec": pod}}},
    )
    said = "each tick submits the job under the date, in UTC, that the tick was due. The token is in the secret renderfarm-ray."
    return _manifests(tick, said, files.config_map(pods), cronjob)


def _raycronjob(tick: Tick) -> Schedule:
    if tick.image is None or tick.address is not None:
        raise InvalidJob(
            "raycronjob: give --image (one with renderfarm and Ray in it), and no --address: each tick has a cluster of its own"
        )
    command = Tick(**{**vars(tick), "address": "auto"}).command(f"{MOUNT}/job.yaml", DAY)
    # a file: whatever is in the command is read by one shell, and not by those between KubeRay and the head
    pods, files = _pods(tick), _files(tick, **{_RUN_FILE: f"{_RUN_OF_TICK}exec {command}\n"})
    job = ray_job(tick.job, pods, files, f"sh {MOUNT}/{_RUN_FILE}", {WRITTEN_IN: _written_in(tick)})
    raycronjob = _when_due(tick, pods, ("ray.io/v1", "RayCronJob"), jobTemplate=job)
    said = (
        "each tick renders on a cluster of its own, under the date, in UTC, that it was due, as KubeRay 1.7 names it; with an older one,\n"
        "# under that of its start.\n"
        "# RayCronJob is an alpha of KubeRay, behind its feature gate; `--kind cronjob` needs none."
    )
    return _manifests(tick, said, files.config_map(pods), raycronjob)


def _manifests(tick: Tick, said: str, *documents: dict[str, Any]) -> Schedule:
    sent = set(map(str, _beside(tick).values()))
    local = [f"  {place}" for place, path in tick.job.places() if path.startswith("/") and path not in sent]
    why = f"in no store; in the pods, where relative paths begin at {MOUNT}, these must lead to a volume or into the image:"
    note = remarks(why, *local) if local else ""
    text = _heading(tick, said) + note + to_yaml(*documents)
    return Schedule({f"{tick.name}.yaml": text}, f"kubectl {' '.join(APPLY)} -f {tick.name}.yaml")


# ------------------------------------------------------------------------------------------------ Airflow


def _airflow(tick: Tick) -> Schedule:
    # Airflow fills {{ ds }} with the run's logical date; what the job file has of it is not Airflow's to see
    command = re.sub(r"\{[%#]", "{{ '\\g<0>' }}", tick.command(str(tick.file), "{{ ds }}", _program()))
    text = f'''{_heading(tick, "a DAG for Airflow 3; put it into the dags folder")}"""Each run renders the data of its logical date."""

from datetime import datetime, timedelta, timezone

from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG

with DAG(
    dag_id={json.dumps(tick.name)},
    schedule={json.dumps(tick.at)},
    start_date=datetime(2024, 1, 1, tzinfo=timezone.utc),
    catchup=False,  # `renderfarm backfill` makes up for days
    max_active_runs={1 if tick.overlap == "wait" else 16},
) as dag:
    BashOperator(
        task_id="render",
        bash_command={json.dumps(command, ensure_ascii=False)},
        retries=3,  # a run that goes on redoes nothing
        retry_delay=timedelta(minutes=5),
    )
'''
    return Schedule({f"{tick.name.replace('-', '_')}.py": text}, "put it into Airflow's dags folder")


KINDS: tuple[Kind, ...] = get_args(Kind)
