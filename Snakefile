# train -> attack, certify -> chapters -> figures/<profile>/ and _build/<profile>/*.ipynb
#
#   snakemake --cores 2 --config profile=quick          (make figures PROFILE=quick)
#   snakemake --workflow-profile slurm --config profile=paper processes=8
#
# Training keeps its own checkpoints beside run.json, which appears when the run is complete, so that the next call goes
# on from the last epoch. Tables are made of pieces that are kept beside the run in the same way.
#
# Snakemake deletes the outputs of a job when it begins and when it fails. Nothing that is worth keeping is therefore an
# output of a rule: each command puts what it makes in place once it is whole, and an empty mark in _build/<profile>/done
# stands for it. What is done is told by what files say of themselves, not by when they were written, since they are
# copied in any order and made by hand, too: before anything is planned, a finished run has its mark, and so has a table
# that the profile would make so today, with a time after its runs', and a chapter that was executed from the words and
# rows that are here; any other one has none.
import os
import re
import shlex
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(workflow.basedir))
from clustr_core.measuring.profile import load_profile
from clustr_core.measuring.versions import VERSIONS
from clustr_core.measuring.written import asked_beside, check_weights, is_written
from clustr_core.storage.files import digest, home, write_string
from clustr_core.storage.gate import brief
from clustr_core.training.names import DONE
from clustr_core.training.recipes import run_folder, run_key
from tools import notebooks

if home().resolve() != Path.cwd():
    raise ValueError(f"CLUSTR_HOME: expected the folder of this book, {Path.cwd()}, or none, got {home()}")
PROFILE = load_profile(config.get("profile", "quick"))
NAME = PROFILE.name
# the profile as the commands are given it: a file may lie anywhere, under a name that a shell would read otherwise
GIVEN = shlex.quote(str(PROFILE.path) if PROFILE.name != PROFILE.path.stem else NAME)
PYTHON = shlex.quote(sys.executable)
# so many processes, on one machine, share each training and each measurement; a GPU each where GPUs are asked for
PROCESSES = config.get("processes", 1)
if type(PROCESSES) is not int or PROCESSES < 1:
    raise ValueError(f"processes: expected a number above 0, got {brief(PROCESSES)}")
CLUSTR = f"{PYTHON} -m clustr_core"
if PROCESSES > 1:
    # one thread each, where Snakemake would give each as many as the job has
    THREADS = "env OMP_NUM_THREADS=1 MKL_NUM_THREADS=1"
    CLUSTR = f"{THREADS} {PYTHON} -m torch.distributed.run --standalone --nproc_per_node={PROCESSES} -m clustr_core"
CORE = sorted(str(path) for path in [*Path("clustr_core").rglob("*.py"), *Path("proofs").glob("*.v")])
TOOLS = ["tools/execute.py", "tools/notebooks.py"]

METHOD_OF = {run_key(recipe): method for method, recipe in PROFILE.recipes.items()}
RESULTS = Path("results") / NAME
MARKS = Path("_build") / NAME / "done"
RUN_OF = {method: f"{MARKS}/run-{key}" for key, method in METHOD_OF.items()}
# one command writes diagnostics and ablations, and one mark stands for both
TABLES = [f"{MARKS}/{kind}-{method}" for kind, method in PROFILE.tables if kind != "ablations"]
# where Snakemake is started again for one job, what was not there when the job was sent may be there now
PLANS = workflow.is_main_process
FINISHED = {method: run_folder(PROFILE.recipes[method]) / DONE for method in RUN_OF}
TRAINED = [key for key, method in METHOD_OF.items() if PLANS and FINISHED[method].exists()]
# the methods from whose runs attacks are transferred
SOURCES = sorted({each.source for each in PROFILE.attacks.values() if each.attack == "transfer"})
# prototypes are certified without a run: what their table depends on is code
CERTIFYING = [path for path in CORE if "certificates" in Path(path).parts]
CHAPTERS = {source.stem: notebooks.read_source(source) for source in notebooks.sources(Path("."))}


if unknown := sorted(set(PROFILE.chapters) - set(CHAPTERS)):
    raise ValueError(f"{PROFILE.path.name}: chapters: expected some of {sorted(CHAPTERS)}, got {unknown}")
drawn = Counter(label for source in CHAPTERS.values() for label in notebooks.figure_labels(source))
if twice := sorted(label for label, count in drawn.items() if count > 1):
    raise ValueError(f"notebooks: expected one chapter to draw {twice[0]}, got {drawn[twice[0]]}, as copies of one do")
# runs are named by their folder of images, and Snakemake takes what stands in braces for a wildcard
if braced := [recipe.dataset for recipe in PROFILE.recipes.values() if re.search("[{}]", run_key(recipe))]:
    raise ValueError(f"{PROFILE.path.name}: dataset: expected a folder whose name has no braces, got {brief(braced[0])}")


def done_today():
    """What is what would be made today, by the name of its mark, and the files whose latest is the mark's time."""
    done = {f"run-{key}": [FINISHED[METHOD_OF[key]]] for key in TRAINED}
    for kind, method in PROFILE.tables:
        kinds = ("diagnostics", "ablations") if kind == "diagnostics" else (kind,)
        if kind != "ablations" and all(is_written(RESULTS, PROFILE, each, method) for each in kinds):
            radii = [RESULTS / f"certificates-{method}.csv"] if kind == "sandwich" else []
            tables = [RESULTS / f"{each}-{method}.csv" for each in kinds]
            # as the rules below say; a later time would hide a change of the code, on which prototypes depend
            others = {"attacks": SOURCES, "diagnostics": ["ce"]}.get(kind, [])
            runs = [FINISHED[each] for each in (method, *others) if each in FINISHED]
            done[f"{kind}-{method}"] = [*tables, *radii, *runs]
    for chapter in CHAPTERS:
        executed = Path(f"_build/{NAME}/{chapter}.ipynb")
        if notebooks.is_current(Path("."), Path(f"notebooks/{chapter}.md"), executed, PROFILE):
            done[chapter] = [executed]
    return done


def settle():
    """Mark what is done, and nothing else."""
    for recipe in PROFILE.recipes.values():
        check_weights(recipe)
    done = done_today()
    for name in {*map(os.path.basename, [*RUN_OF.values(), *TABLES]), *CHAPTERS} - set(done):
        (MARKS / name).unlink(missing_ok=True)
    for name, files in done.items():
        # a file of one's own, whoever left the last one
        write_string(MARKS / name, "")
        latest = max(path.stat().st_mtime_ns for path in files if path.is_file())
        os.utime(MARKS / name, ns=(latest, latest))


def needs(mem_mb, runtime, processes=PROCESSES):
    """What a job of profile paper or gpu asks a cluster for: a GPU and so many MB for each process, so many minutes.

    These are estimates on the safe side, for neither has been run. The others need no GPU, and little.
    """
    if NAME not in ("paper", "gpu"):
        return {"gpu": 0, "mem_mb": 4000 * processes, "runtime": 240}
    return {"gpu": processes, "mem_mb": mem_mb * processes, "runtime": runtime, "nodes": 1}


def warm_start(wildcards):
    """The run that this one starts from, if any."""
    start = PROFILE.recipes[METHOD_OF[wildcards.key]].warm_start
    return [f"{MARKS}/run-{run_key(start)}"] if start else []


wildcard_constraints:
    key="|".join(re.escape(key) for key in METHOD_OF if key not in TRAINED) or "none",
    method="|".join([*RUN_OF, "prototypes"]),


if PLANS:
    settle()


rule all:
    input:
        [f"{MARKS}/{chapter}" for chapter in CHAPTERS],
        TABLES,


rule train:
    input:
        warm_start,
    output:
        touch(f"{MARKS}/run-{{key}}"),
    params:
        method=lambda wildcards: METHOD_OF[wildcards.key],
    threads: PROCESSES
    resources:
        **needs(mem_mb=16000, runtime=1440),
    shell:
        "{CLUSTR} train --profile {GIVEN} --method {params.method}"


rule attack:
    input:
        lambda wildcards: RUN_OF[wildcards.method],
        [RUN_OF[source] for source in SOURCES],
    output:
        touch(f"{MARKS}/attacks-{{method}}"),
    params:
        version=VERSIONS["attack"],
        protocol=PROFILE.protocol("attacks"),
        beside=asked_beside(PROFILE, "attacks"),
    threads: PROCESSES
    resources:
        **needs(mem_mb=16000, runtime=1440),
    shell:
        "{CLUSTR} attack --profile {GIVEN} --method {wildcards.method}"


rule diagnose:
    input:
        lambda wildcards: RUN_OF[wildcards.method],
        [RUN_OF["ce"]] if "ce" in RUN_OF else [],
    output:
        touch(f"{MARKS}/diagnostics-{{method}}"),
    params:
        version=VERSIONS["diagnostics"],
        protocol=PROFILE.protocol("diagnostics"),
    threads: 1
    resources:
        **needs(mem_mb=8000, runtime=480, processes=1),
    shell:
        "{PYTHON} -m clustr_core diagnose --profile {GIVEN} --method {wildcards.method}"


rule certify:
    input:
        lambda wildcards: RUN_OF.get(wildcards.method, CERTIFYING),
    output:
        touch(f"{MARKS}/certificates-{{method}}"),
    params:
        version=VERSIONS["certificate"],
        protocol=PROFILE.protocol("certificates"),
        beside=asked_beside(PROFILE, "certificates"),
        dataset=sorted({recipe.dataset for recipe in PROFILE.recipes.values()}),
    threads: PROCESSES
    resources:
        **needs(mem_mb=8000, runtime=480),
    shell:
        "{CLUSTR} certify --profile {GIVEN} --method {wildcards.method}"


rule sandwich:
    input:
        lambda wildcards: RUN_OF[wildcards.method],
        # the radii within which the attacks search
        f"{MARKS}/certificates-{{method}}",
    output:
        touch(f"{MARKS}/sandwich-{{method}}"),
    params:
        version=VERSIONS["sandwich"],
        protocol=PROFILE.protocol("sandwich"),
        beside=asked_beside(PROFILE, "sandwich"),
    threads: PROCESSES
    resources:
        **needs(mem_mb=8000, runtime=1440),
    shell:
        "{CLUSTR} sandwich --profile {GIVEN} --method {wildcards.method}"


for chapter, source in CHAPTERS.items():

    rule:
        name:
            f"chapter_{chapter.replace('-', '_')}"
        input:
            [*RUN_OF.values(), *TABLES] if notebooks.uses_tables(source) else [],
            CORE,
            TOOLS,
            source=f"notebooks/{chapter}.md",
        output:
            touch(f"{MARKS}/{chapter}"),
        params:
            notebook=f"_build/{NAME}/{chapter}.ipynb",
            # by its words, since a path with braces could not be an input
            profile=digest(PROFILE.path.read_bytes()),
        threads: 1
        shell:
            "{PYTHON} -m tools.execute {input.source:q} --profile {GIVEN} --output {params.notebook:q}"
