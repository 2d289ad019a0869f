"""``python -m mmdet_lors TOOL ...`` runs a tool of an installed package, which has no ``tools`` folder beside it."""

import runpy
import sys
from pathlib import Path

TOOLS = Path(__file__).parent / ".mim" / "tools"
USAGE = "usage: python -m mmdet_lors TOOL [ARGUMENTS]\n\nTOOL is one of:\n  "


def main() -> None:
    """Run the tool that the first argument names, such as ``train`` or ``analysis_tools/model_report``."""
    scripts = [path for path in TOOLS.rglob("*.py") if "__main__" in path.read_text()]  # others are parts of these
    tools = sorted(path.relative_to(TOOLS).with_suffix("").as_posix() for path in scripts)
    name = sys.argv[1].removesuffix(".py") if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(USAGE + "\n  ".join(tools))
        return
    if name not in tools:
        sys.exit(f"error: {name} is not a tool of mmdet_lors; python -m mmdet_lors --help lists them")
    path = TOOLS / f"{name}.py"
    if "mmdet_lors.registry" not in sys.modules:  # imported for -m, without its parts: the tool imports it whole
        for module in ("mmdet_lors", "mmdet_lors.compatibility"):
            sys.modules.pop(module, None)
    sys.argv = [str(path), *sys.argv[2:]]
    sys.path.insert(0, str(path.parent))
    runpy.run_path(str(path), run_name="__main__")


if __name__ == "__main__":
    main()
