"""The two laws of the house: who may import whom, and that applying a model needs nothing of training."""

import ast
import subprocess
import sys

import pytest
from conftest import REPOSITORY

from fastnst.cli import VERBS

PACKAGE = REPOSITORY / "fastnst"
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("__"))

# Each noun and the modules that it may import.
NOUNS = {
    "config": set(),
    "files": set(),
    "runtime": set(),
    "background": set(),
    "ranks": {"runtime"},
    "schedule": {"config"},
    "picture": {"config", "files", "runtime"},
    "image": {"picture"},
    "video_input": {"picture"},
    "video_output": {"config", "files", "picture", "video_input"},
    "streaming": {"background", "files", "picture", "video_input", "video_output"},
    "motion": set(),
    "preview_page": set(),
    "model": {"config", "files", "runtime"},
    "stages": {"model"},
    "eight_bits": {"stages"},
    "onnx_graph": {"eight_bits", "files", "model", "runtime", "stages"},
    "fused_kernel": {"runtime"},
    "fused_norm": {"fused_kernel", "stages"},
    "fused": {"fused_norm", "runtime"},
    "adam": set(),
    "pull": set(),
    "fused_adam": {"adam", "fused", "fused_kernel", "runtime"},
    "wide": {"stages"},
    "fused_weights": {"fused_kernel"},
    "fused_pixels": {"fused_kernel", "fused_norm", "stages", "wide"},
    "nvidia": {"fused_norm", "fused_pixels", "stages", "wide"},
    "steps": {"wide"},
    "fused_network": {"background", "fused_norm", "fused_pixels", "fused_weights", "model", "pull", "steps", "wide"},
    "cpu_network": {"native_norm", "stages", "steps", "wide", "winograd"},
    "fused_features": {"fused_kernel", "fused_pixels", "runtime", "wide"},
    "self_product": {"runtime"},
    "fused_distances": {"fused_kernel", "self_product"},
    "recording": {"fused_kernel"},
    "moments": set(),
    "native_build": set(),
    "native_library": {"runtime", "stages"},
    "native": {"moments", "native_library", "runtime", "stages"},
    "graph_engine": {"eight_bits", "onnx_graph", "runtime", "stages"},
    "torch_engine": {"fused", "grain", "nvidia", "recording", "runtime", "stages"},
    "engine": {"graph_engine", "model", "native", "native_library", "onnx_graph", "runtime", "stages", "torch_engine"},
    "tiles": {"engine", "moments", "runtime", "stages"},
    "blend": {"picture"},
    "grain": set(),
    "jobs": {"files", "picture"},
    "winograd": {"native_library"},
    "native_norm": {"native_library", "stages"},
    "native_features": {"native_library"},
    "native_distance": {"native_library", "runtime"},
    "network": {"cpu_network", "fused", "fused_network", "model", "wide", "winograd"},
    "loss_network": {"config", "fused", "fused_features", "native_features", "native_library", "runtime", "winograd"},
    "texture": set(),
    "losses": {"background", "fused", "fused_distances", "loss_network", "native_distance", "pull", "self_product", "texture"},
    "photo_cache": {"files", "runtime"},
    "data": {"background", "config", "photo_cache", "picture", "runtime"},
    "objective": {"background", "losses", "runtime"},
    "gradient": {"fused", "fused_network", "objective", "ranks", "recording", "runtime"},
    "optimizer": {"adam", "fused", "fused_adam"},
    "benchmark_inference": {"checkpoint", "engine", "network", "picture", "runtime", "stages"},
    "benchmark_training": {"data", "gradient", "losses", "loss_network", "native_library", "network", "objective", "optimizer", "published", "runtime", "winograd"},
    "published": {"loss_network", "losses", "model", "network", "runtime"},
    "benchmark_recipes": {"checkpoint", "config", "data", "files", "image", "judges", "loss_network", "losses", "metrics", "model", "report", "task"},
    "checkpoint": {"files", "model", "network", "runtime"},
    "sheet": set(),
    "metrics": set(),
    "report": {"files", "sheet"},
    "judges": {"loss_network", "losses"},
    "yardstick": {"files", "image", "loss_network", "losses"},
    "contender": {"checkpoint", "config", "data", "image", "loss_network", "losses", "network", "picture"},
    "watchdog": set(),
    "survey": {"data", "picture"},
    "run": {"checkpoint", "config", "files", "model", "runtime"},
    "training": {"background", "checkpoint", "image", "model", "picture", "run", "runtime", "schedule", "task", "watchdog"},
    "task": {"config", "data", "gradient", "image", "loss_network", "losses", "metrics", "model", "network", "objective", "optimizer", "photo_cache", "picture", "ranks", "runtime", "schedule"},
}
TRAINING = {"train", "losses", "texture", "loss_network", "data", "photo_cache", "objective", "gradient", "optimizer", "adam", "fused_adam", "pull", "benchmark_training", "published", "benchmark_recipes", "optimize", "distill", "evaluate", "export", "schedule", "watchdog", "survey", "run", "task", "training"}
# Each verb; any noun is open to those that train.
ALLOWED_TO_VERBS = {
    "train": set(NOUNS),
    "optimize": set(NOUNS),
    "evaluate": set(NOUNS),
    "distill": set(NOUNS),
    "stylize": {"blend", "engine", "grain", "jobs", "model", "picture", "runtime", "stages", "tiles"},
    "export": {"checkpoint", "engine", "files", "onnx_graph"},
}
# Scripts that are no verb of their own: they put verbs together, or draw.
COMPOSED = {"preview": {"optimize"}, "publish": set(), "quickstart": {"stylize", "scripts"}, "draw_style": set(), "benchmark": set(), "benchmark_training": set(), "benchmark_inference": set(), "benchmark_recipes": {"train"}}
# Scripts of a verb that hand it another verb's act.
INJECTED = {"evaluate": {"evaluate", "optimize"}}


def fastnst_imports(source: str, whole_file: bool = True) -> set[str]:
    """Modules of the package that a source imports, anywhere or at the top alone."""
    tree = ast.parse(source)
    found = set()
    for node in ast.walk(tree) if whole_file else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "fastnst"}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = f"fastnst.{base}".rstrip(".")
            if base == "fastnst":
                found |= {f"fastnst.{alias.name}" for alias in node.names}
            elif base.startswith("fastnst."):
                found.add(base)
    return {name.removeprefix("fastnst.").split(".")[0] for name in found} - {"__version__"}


def imports_of(module: str) -> set[str]:
    return fastnst_imports((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "source, expected",
    [
        ("import fastnst.train", {"train"}),
        ("from fastnst import losses, data", {"losses", "data"}),
        ("def f():\n    from fastnst.scripts.train import main", {"scripts"}),
        ("from . import network", {"network"}),
        ("from .config import Config", {"config"}),
        ("from fastnst import __version__\nimport torch", set()),
    ],
)
def test_every_way_to_import_is_seen(source, expected):
    assert fastnst_imports(source) == expected


def test_every_module_is_a_known_noun_or_verb():
    assert set(MODULES) - {"cli"} <= set(NOUNS) | set(ALLOWED_TO_VERBS)


@pytest.mark.parametrize("module", [module for module in MODULES if module in NOUNS])
def test_a_noun_imports_only_what_its_layer_may(module):
    assert imports_of(module) <= NOUNS[module]


@pytest.mark.parametrize("module", [module for module in MODULES if module in ALLOWED_TO_VERBS])
def test_a_verb_imports_nouns_alone(module):
    assert imports_of(module) <= ALLOWED_TO_VERBS[module]


def test_the_command_line_imports_nothing_of_the_package_at_the_top():
    assert fastnst_imports((PACKAGE / "cli.py").read_text(encoding="utf-8"), whole_file=False) == set()


def test_each_verb_has_exactly_one_script_of_its_name():
    verbs = {module for module in MODULES if module in ALLOWED_TO_VERBS}
    scripts = {path.stem for path in (REPOSITORY / "scripts").glob("*.py")} - {"__init__"}
    assert scripts - set(COMPOSED) == verbs
    assert verbs <= set(VERBS) <= scripts


@pytest.mark.parametrize("script", sorted(path.stem for path in (REPOSITORY / "scripts").glob("[a-z]*.py")))
def test_a_script_imports_no_verb_but_its_own(script):
    imported = fastnst_imports((REPOSITORY / "scripts" / f"{script}.py").read_text(encoding="utf-8"))
    assert imported & (set(ALLOWED_TO_VERBS) | {"scripts"}) == (COMPOSED | INJECTED).get(script, {script})


def modules_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sys.modules, sep='\\n')"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_applying_a_model_loads_nothing_of_training():
    loaded = modules_after("import fastnst.stylize")
    assert "fastnst.stylize" in loaded
    foreign = {"torchvision", "tensorboard", "torch.utils.tensorboard", "onnx", "onnxruntime", "av", "cv2"}
    assert loaded & (foreign | {f"fastnst.{module}" for module in TRAINING}) == set()


def test_video_needs_no_torch_and_loads_its_libraries_when_it_begins():
    loaded = modules_after("import fastnst.streaming, fastnst.motion, fastnst.preview_page")
    assert {"fastnst.video_input", "fastnst.video_output"} <= loaded
    assert loaded & {"torch", "av", "cv2"} == set()


@pytest.mark.parametrize("statement", ["import fastnst", "import fastnst.cli", "import fastnst.scripts.train, fastnst.scripts.stylize"])
def test_help_needs_no_torch(statement):
    assert "torch" not in modules_after(statement)
