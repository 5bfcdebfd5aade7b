"""What was asked of a run: the command line as one frozen, checked value."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attention
from attention.sharding import AXES
from errors import InputError, Parser, quote
from kascade_core import Selection
from measure import hosts
from report import tables
from report.results import is_stdout
from weights.config import LlamaConfig
from weights.folder import DEFAULT_WEIGHTS

DEFAULT_DECODE = 64
DEFAULT_DEPTHS = (512, 2048, 8192)
DEFAULT_TEXT = Path(__file__).resolve().parents[1] / "wikipedia_sample.txt"
DTYPES = ("float32", "bfloat16", "float16")
THRESHOLD, DP, SEARCH, LOADED = "threshold", "dp", "search", "loaded"  # what makes the schedule
JACCARD, MASS = "jaccard", "mass"  # similarity of layers
UNIFORM, PER_LAYER, PER_HEAD = "uniform", "layer", "head"  # who has a budget of its own
NIAH_SINGLE, NIAH_MULTIKEY, VT, FWE = "niah_single", "niah_multikey", "vt", "fwe"  # the tasks
TASKS = (NIAH_SINGLE, NIAH_MULTIKEY, VT, FWE)
FILLER_NOISE, FILLER_TEXT = "noise", "text"  # of the tasks' haystacks
TASK_DEFAULTS = {"task_len": 2048, "task_n": 50, "task_filler": FILLER_NOISE}
ANCHOR_SHARE = 0.3  # of the layers, when --anchors is not given
OUTPUTS = ("json", "html", "csv", "markdown", "save_schedule")  # files that a run writes
MOST_TOKENS = 2**31 - 1  # positions are 32-bit numbers
DEFAULT_WINDOWS = 4  # of the test text
SHORT_CONTEXT = 512  # tokens of context that long_ppl takes for a short one
LIMIT_WINDOWS = (3, 8)  # of the calibration text with max_degradation: at least one to fit and two to check on


LEAST = {  # of the flags that are whole numbers; those of a selection check themselves
    **dict.fromkeys(("tile_size", "top_k", "query_tile"), 1),
    **dict.fromkeys(("sink_tiles", "local_tiles", "min_tiles", "decode", "generate"), 0),
    **dict.fromkeys(("max_reuse_dist", "anchors", "n_runs", "windows", "calib_windows"), 1),
    **dict.fromkeys(("batch", "task_len", "task_n"), 1),
    "seq_len": 2,
}


def _flag(default: Any, help: str, choices: Sequence[str] | None = None, metavar: str | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "metavar": metavar})


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that was asked of a run; each field but `selection` is a flag, and its meaning is the flag's help.

    Defaults that depend on other flags are resolved when it is built, those that depend on the model by `for_model`.

    Raises:
      InputError: a value out of range, or values that do not go together.
    """

    selection: Selection = Selection()
    device: str = _flag("cpu", "what JAX computes on", ("cpu", "tpu", "gpu"))
    threshold: float = _flag(0.65, "least similarity at which a layer reuses another's tiles, in [0, 1]")
    max_reuse_dist: int = _flag(4, "a layer reuses an anchor fewer layers back than this")
    scheduler: str | None = _flag(
        None,
        "what makes the schedule: the threshold rule, the paper's dynamic programme, or a search that measures the "
        "damage of every layer (threshold; search with --max_degradation)",
        (THRESHOLD, DP, SEARCH),
    )
    similarity: str | None = _flag(None, "of layers, for threshold and dp (jaccard)", (JACCARD, MASS))
    anchors: int | None = _flag(None, "number of anchor layers of dp and search (3 of 10 layers)")
    anchor_layers: tuple[int, ...] = _flag(
        (),
        "the anchor layers of dp, instead of letting it choose: every later layer reuses the nearest one before it, "
        "and layers before the first are dense",
        metavar="N,N,...",
    )
    head_maps: Path | None = _flag(
        None,
        "with --anchor_layers, head maps instead of the calibrated ones: an int32 .npy array [layers, KV heads], each "
        "layer's row the anchor's heads",
        metavar="FILE",
    )
    budgets: str | None = _flag(
        None,
        "of search: what has a number of tiles of its own, at one density over all (layer)",
        (UNIFORM, PER_LAYER, PER_HEAD),
    )
    max_degradation: float | None = _flag(
        None,
        "search for the lowest density that costs less than this, above 0, on the calibration text",
        metavar="PERCENT",
    )
    save_schedule: Path | None = _flag(None, "write the schedule to FILE", metavar="FILE")
    load_schedule: Path | None = _flag(
        None, "use the schedule and the tile sizes of FILE instead of calibrating", metavar="FILE"
    )
    weights_dir: Path | None = _flag(
        None, f"folder made by convert_weights.py ({DEFAULT_WEIGHTS}, made if missing)", metavar="DIR"
    )
    text: Path = _flag(DEFAULT_TEXT, "UTF-8 text to test on (the sample)", metavar="FILE")
    calib_text: Path | None = _flag(
        None, "UTF-8 text to calibrate on (the tokens of --text before the tested ones)", metavar="FILE"
    )
    mesh: str = _flag(
        "auto",
        "how the devices share the work, as in data=1,context=2,model=4: windows, query tiles, and heads with their "
        "weights; auto splits the weights by as many devices as they need to fit, and query tiles by the others",
        metavar="AXIS=N,...",
    )
    seq_len: int = _flag(512, "tokens in each window")
    windows: int | None = _flag(
        None, f"windows to test on, one after another ({DEFAULT_WINDOWS}, or as many as the text holds)"
    )
    calib_windows: int | None = _flag(
        None,
        f"windows to calibrate on (1; with --max_degradation {LIMIT_WINDOWS[1]}, or as many as the text holds)",
    )
    n_runs: int = _flag(5, "timed runs of each kind")
    dtype: str = _flag("auto", "of matrix inputs; auto takes the faster of float32 and bfloat16", ("auto", *DTYPES))
    kernel: str = _flag(
        "auto",
        "implementation of attention; auto takes the device's own where it supports the sizes, otherwise xla",
        ("auto", *attention.KERNELS),
    )
    decode: int | None = _flag(
        None,
        "tokens to decode after each test window, over the text's own next tokens; 0 for none "
        f"({DEFAULT_DECODE}, or none where the text ends before)",
    )
    batch: int = _flag(1, "windows decoded at once")
    prefill: str = _flag("sparse", "what fills the cache that the sparse arm decodes with", ("sparse", "dense"))
    depths: tuple[int, ...] | None = _flag(
        None,
        "time decoding at these depths, at least 1, on caches of random keys (512,2048,8192 up to the model's context; "
        "none with --decode 0)",
        metavar="N,N,...",
    )
    generate: int = _flag(0, "print the greedy continuation of the first test window by both arms, N tokens")
    json: Path | None = _flag(None, "write everything that was measured to FILE", metavar="FILE")
    sweep: tuple[int, ...] = _flag(
        (),
        "also time these lengths, at least query_tile and 2, with the run's schedule and the tested tokens, repeated "
        "where too few",
        metavar="N,N,...",
    )
    densities: tuple[float, ...] = _flag(
        (),
        "also a schedule, its quality and its time at each of these densities, in (0, 1], of the sparse layers; as "
        "with --sweep, rows that the file of --json has from a run with the same flags are taken from there",
        metavar="X,X,...",
    )
    html: Path | None = _flag(None, "write a page with plots of everything to FILE", metavar="FILE")
    csv: Path | None = _flag(
        None, "write one row a measurement to FILE, after those that it has already", metavar="FILE"
    )
    markdown: Path | None = _flag(None, "the same as a Markdown table", metavar="FILE")
    long_ppl: bool = _flag(
        False, f"also the perplexity over the tokens that need more than {SHORT_CONTEXT} tokens of context"
    )
    tasks: tuple[str, ...] = _flag(
        (), f"also retrieval tasks, made offline: any of {', '.join(TASKS)}", metavar="NAME,NAME,..."
    )
    task_len: int | None = _flag(None, "tokens of a task's prompt and answer ({task_len})".format(**TASK_DEFAULTS))
    task_n: int | None = _flag(None, "prompts of each task ({task_n})".format(**TASK_DEFAULTS))
    task_filler: str | None = _flag(
        None,
        "what niah_single and vt hide their sentences in: short sentences repeated, or --text ({task_filler})".format(
            **TASK_DEFAULTS
        ),
        (FILLER_NOISE, FILLER_TEXT),
    )
    coordinator: str | None = _flag(
        None,
        "on several hosts: where process 0 is, with a free port; not on TPU pod slices and SLURM",
        metavar="HOST:PORT",
    )
    num_processes: int | None = _flag(None, "with --coordinator: how many processes there are, at least 1")
    process_id: int | None = _flag(None, "with --coordinator: which this is, at least 0; 0 prints and writes files")
    verbose: bool = _flag(False, "also print each layer's tiles")
    quiet: bool = _flag(False, "print the results alone")
    debug: bool = _flag(False, "show the traceback of an error")

    def __post_init__(self) -> None:
        self._resolve_defaults()
        self._check_ranges()
        self._check_schedule()
        self._check_lengths()
        self._check_tasks()
        self._check_processes()
        if not self.process_id:  # the others write nothing
            self._check_outputs()

    def _check_processes(self) -> None:
        names = ("coordinator", "num_processes", "process_id")
        given = [name for name in names if getattr(self, name) is not None]
        if not given:
            return
        if len(given) < len(names):
            raise InputError(f"{', '.join(names)} go together: give all three or none, got only {', '.join(given)}")
        hosts.split_address(self.coordinator)
        if not 1 <= self.num_processes <= MOST_TOKENS:
            raise InputError(f"num_processes must be at least 1 and below 2^31, got {quote(self.num_processes)}")
        if not 0 <= self.process_id < self.num_processes:
            raise InputError(
                f"process_id must be from 0 to {self.num_processes - 1}, one below num_processes, got "
                f"{quote(self.process_id)}"
            )

    def _check_outputs(self) -> None:
        paths = {name: path for name in OUTPUTS if (path := getattr(self, name))}
        for name, path in paths.items():
            appended = name in ("csv", "markdown")
            if not can_be_written(path, appended) or (is_stdout(path) and (appended or name == "html")):
                raise InputError(f"{name}: cannot write {path}: give a file in a folder that exists and is open to you")
            same = [other for other in paths if other < name and paths[other].resolve() == path.resolve()]
            if same:
                raise InputError(f"{same[0]} and {name} would both write {path}: give each a file of its own")

    def _resolve_defaults(self) -> None:
        scheduler = self.scheduler or (DP if self.anchor_layers else THRESHOLD)
        if self.scheduler is None and self.max_degradation is not None:
            scheduler = SEARCH
        self._set(scheduler=LOADED if self.load_schedule and self.scheduler is None else scheduler)
        if self.scheduler in (THRESHOLD, DP) and self.similarity is None:
            self._set(similarity=JACCARD)
        if self.scheduler == SEARCH and self.budgets is None:
            self._set(budgets=PER_LAYER)
        if self.tasks:
            self._set(**{name: value for name, value in TASK_DEFAULTS.items() if getattr(self, name) is None})
        for name in ("weights_dir", "text", "calib_text", "load_schedule", "head_maps", *OUTPUTS):
            if path := getattr(self, name):
                self._set(**{name: path.expanduser()})

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _check_ranges(self) -> None:
        for name in LEAST.keys() - selection_flags():
            value, least = getattr(self, name), LEAST[name]
            if value is not None and not least <= value <= MOST_TOKENS:
                where = f"at least {least}" if least else "0 (for none) or more,"
                raise InputError(f"{name} must be {where} and below 2^31, got {quote(value)}")
        if self.depths and not 1 <= min(self.depths) <= max(self.depths) <= MOST_TOKENS:
            raise InputError(f"depths must be at least 1 and below 2^31, got {quote(self.depths)}")
        if self.densities and not 0 < min(self.densities) <= max(self.densities) <= 1:
            raise InputError(f"densities must be above 0 and at most 1, got {quote(self.densities)}")
        mesh_axes(self.mesh)
        if not 0 <= self.threshold <= 1:
            raise InputError(f"threshold must be in [0, 1], got {self.threshold}")
        if self.max_degradation is not None and not 0 < self.max_degradation < math.inf:
            raise InputError(f"max_degradation must be above 0, got {self.max_degradation}")
        if self.max_degradation is not None and self.calib_windows in range(1, LIMIT_WINDOWS[0]):
            raise InputError(
                f"calib_windows must be at least {LIMIT_WINDOWS[0]} with max_degradation, which fits on some and "
                f"checks on the others, got {self.calib_windows}"
            )
        if self.windows is not None and self.decode != 0 and self.batch > self.windows:
            raise InputError(f"batch must be at most windows, {self.windows}, which it decodes, got {self.batch}")
        if self.verbose and self.quiet:
            raise InputError("verbose and quiet exclude each other: give one of them")

    def _check_schedule(self) -> None:
        """Refuses flags that the schedule's maker does not read."""
        if self.load_schedule and self.scheduler != LOADED:
            raise InputError("scheduler has no effect with load_schedule, which brings a finished schedule")
        for name, schedulers in {
            "similarity": (THRESHOLD, DP),
            "anchors": (DP, SEARCH),
            "anchor_layers": (DP,),
            "head_maps": (DP,),
            "budgets": (SEARCH,),
            "max_degradation": (SEARCH,),
            "save_schedule": (THRESHOLD, DP, SEARCH),
            "calib_windows": (THRESHOLD, DP, SEARCH),
        }.items():
            if getattr(self, name) not in (None, ()) and self.scheduler not in schedulers:
                maker = "load_schedule" if self.scheduler == LOADED else f"scheduler {self.scheduler}"
                raise InputError(f"{name} has no effect with {maker}; it needs scheduler {' or '.join(schedulers)}")

        if self.densities and self.load_schedule:
            raise InputError("densities has no effect with load_schedule: its schedules are made by calibration")
        if self.densities and self.max_degradation is not None:
            raise InputError(
                "densities and max_degradation exclude each other: the one asks for densities, the other finds one"
            )
        if self.anchor_layers and self.anchors is not None:
            raise InputError("anchors and anchor_layers exclude each other: give one of them")
        if self.head_maps and not self.anchor_layers:
            raise InputError("head_maps has no effect without anchor_layers, which says whose heads they name")
        if self.selection.min_tiles and self.scheduler == SEARCH:
            raise InputError("min_tiles has no effect with scheduler search, which gives out budgets of its own")

    def _check_lengths(self) -> None:
        for name in ("tile_size", "query_tile"):
            if getattr(self.selection, name) > self.seq_len:
                raise InputError(f"{name} must be at most seq_len, {self.seq_len}, got {getattr(self.selection, name)}")
        if self.long_ppl and self.seq_len < 2 * SHORT_CONTEXT:
            raise InputError(
                f"long_ppl needs a seq_len of at least {2 * SHORT_CONTEXT}: it looks for tokens that need more than "
                f"{SHORT_CONTEXT} tokens of context, got {self.seq_len}"
            )
        least = max(2, self.selection.query_tile)
        if self.sweep and not (least <= min(self.sweep) and max(self.sweep) <= MOST_TOKENS):
            raise InputError(
                f"sweep: lengths must be at least {least} (query_tile, and 2) and below 2^31, got {self.sweep}"
            )

    def _check_tasks(self) -> None:
        unknown = [name for name in self.tasks if name not in TASKS]
        if unknown:
            raise InputError(f"tasks: expected any of {', '.join(TASKS)}, got {quote(unknown[0])}")
        for name in TASK_DEFAULTS:
            if not self.tasks and getattr(self, name) is not None:
                raise InputError(f"{name} has no effect without tasks, which names some of {', '.join(TASKS)}")

    @classmethod
    def from_flags(cls, argv: Sequence[str] | None = None, description: str | None = None) -> Settings:
        """Reads the command line; a bad one exits with code 2 and one sentence."""
        parser = make_parser(description)
        given = vars(parser.parse_args(argv))
        sizes = {name: given.pop(name) for name in selection_flags() if name in given}
        try:
            if "load_schedule" in given and sizes:
                raise InputError(f"{min(sizes)} has no effect with load_schedule: the tile sizes come from its file")
            if "max_degradation" in given and (budget := {"top_k", "density", "min_tiles"} & sizes.keys()):
                raise InputError(f"{min(budget)} has no effect with max_degradation, which finds the budgets itself")
            return cls(selection=Selection(**sizes), **given)
        except InputError as error:
            parser.error(str(error))

    def check_files(self) -> None:
        """Opens the files that are read later, and tables to append to, before anything that takes long.

        Raises:
          InputError: a file that is missing or cannot be read; a table with other columns.
        """
        for name in ("text", "calib_text", "load_schedule", "head_maps"):
            if path := getattr(self, name):
                try:
                    path.open("rb").close()
                except OSError as error:
                    raise InputError(f"{name} {path} cannot be read: {error.strerror}") from error
        for path, check in ((self.csv, tables.check_csv), (self.markdown, tables.check_markdown)):
            if path and not self.process_id:
                check(path)

    @property
    def test_windows(self) -> tuple[int, int]:
        """How many windows are tested, at least and at most."""
        return (1, max(DEFAULT_WINDOWS, self.batch)) if self.windows is None else (self.windows, self.windows)

    @property
    def calibration_windows(self) -> tuple[int, int]:
        """How many windows calibrate, at least and at most."""
        if self.calib_windows is not None:
            return self.calib_windows, self.calib_windows
        return (1, 1) if self.max_degradation is None else LIMIT_WINDOWS

    def for_model(self, config: LlamaConfig) -> Settings:
        """The settings with the defaults that depend on the model resolved.

        Raises:
          InputError: more anchors than the model has layers to choose from, or anchor layers that it has not.
        """
        layers = config.num_hidden_layers
        if self.depths is None:
            context = config.max_position_embeddings
            depths = () if self.decode == 0 else tuple(depth for depth in DEFAULT_DEPTHS if depth <= context)
            return dataclasses.replace(self, depths=depths).for_model(config)
        if layers < 2 and self.scheduler in (DP, SEARCH):
            raise InputError(f"scheduler {self.scheduler} needs a second layer, for layer 0 is dense; use threshold")
        if self.anchor_layers and not 1 <= min(self.anchor_layers) <= max(self.anchor_layers) < layers:
            raise InputError(
                f"anchor_layers must be from 1 to {layers - 1}, for layer 0 of the {layers} is dense, got "
                f"{quote(self.anchor_layers)}"
            )
        if self.anchor_layers:
            return self
        if self.scheduler not in (DP, SEARCH):
            return self
        anchors = max(1, round(ANCHOR_SHARE * layers)) if self.anchors is None else self.anchors
        if not 1 <= anchors < layers:
            raise InputError(
                f"anchors must be from 1 to {layers - 1}, for layer 0 of the {layers} is dense, got {anchors}"
            )
        return dataclasses.replace(self, anchors=anchors)


def selection_flags() -> tuple[str, ...]:
    """The names of the flags that are fields of `Selection`."""
    return tuple(field.name for field in dataclasses.fields(Selection) if field.metadata)


def make_parser(description: str | None = None) -> argparse.ArgumentParser:
    """A parser with a flag for every field of `Settings` and `Selection`; absent flags leave no attribute."""
    parser = Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for field in (*dataclasses.fields(Selection), *dataclasses.fields(Settings)[1:]):
        if field.metadata:
            _add_flag(parser, field)
    return parser


def _add_flag(parser: argparse.ArgumentParser, field: dataclasses.Field) -> None:
    help_text = field.metadata["help"]
    if field.type == "bool":
        parser.add_argument(f"--{field.name}", action="store_true", help=help_text)
        return
    if isinstance(field.default, (int, float, str)):
        help_text += f" ({field.default})"
    if field.name in LEAST:
        what, bracket, default = help_text.rpartition(" (")
        help_text = f"{what}, at least {LEAST[field.name]}{bracket}{default}"
    kind, metavar = FLAG_TYPES[field.type.removesuffix(" | None")]
    choices = field.metadata.get("choices")
    metavar = None if choices else field.metadata.get("metavar") or metavar
    parser.add_argument(
        f"--{field.name}", type=kind, choices=choices, metavar=metavar, help=help_text.replace("%", "%%")
    )


def _number_of(kind: Callable[[str], Any], name: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            return kind(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"expected {name}, got {quote(text)}") from error

    return parse


whole_number = _number_of(int, "a whole number")


def whole_numbers(text: str) -> tuple[int, ...]:
    """A flag's N,N,..., ascending, each once."""
    return tuple(sorted({whole_number(part) for part in text.split(",")}))


number = _number_of(float, "a number")


def numbers(text: str) -> tuple[float, ...]:
    """A flag's X,X,..., ascending, each once."""
    return tuple(sorted({number(part) for part in text.split(",")}))


def mesh_axes(text: str) -> dict[str, int]:
    """A mesh's axes by name, such as {"context": 2}; empty for "auto".

    Raises:
      InputError: an axis that there is not, one named twice, or a size below 1.
    """
    if text == "auto":
        return {}
    parts = [part.strip().partition("=") for part in text.split(",")]
    sizes = {name: int(size) for name, _, size in parts if re.fullmatch("[1-9][0-9]{0,8}", size)}
    if len(sizes) < len(parts) or not sizes.keys() <= {*AXES}:
        raise InputError(
            f"mesh: expected auto, or sizes of at least 1 of {', '.join(AXES)}, as in context=2,model=4, got "
            f"{quote(text)}"
        )
    return sizes


def names(text: str) -> tuple[str, ...]:
    """A flag's NAME,NAME,..., in their order, each once."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",")))


FLAG_TYPES: dict[str, tuple[Callable[[str], Any], str]] = {  # by a field's annotation: how it is read, what help shows
    "int": (whole_number, "N"),
    "float": (number, "X"),
    "str": (str, "NAME"),
    "Path": (Path, "FILE"),
    "tuple[int, ...]": (whole_numbers, "N,N,..."),
    "tuple[float, ...]": (numbers, "X,X,..."),
    "tuple[str, ...]": (names, "NAME,NAME,..."),
}


def can_be_written(path: Path, appended: bool = False) -> bool:
    """Whether a report can be put there: a plain file or nothing yet, in a folder open to us, or standard output.

    A file that is replaced may be closed to us, one that is `appended` to may not.
    """
    try:
        if is_stdout(path):
            return True
        plain = path.is_file() or not path.exists()
        if appended and path.exists() and not os.access(path, os.W_OK):
            return False
        return plain and path.resolve().parent.is_dir() and os.access(path.resolve().parent, os.W_OK)
    except (OSError, ValueError):  # a name too long, or one that no file has
        return False
