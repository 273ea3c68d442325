"""Runs one of the project's VyOS scripts in a process of its own, as VyOS would.

It uses the real `vyos` library where VYOS_1X names a checkout of vyos-1x (with libvyosconfig installed and
python/vyos/xml_ref/pkg_cache/vyos_1x_cache.py generated). Otherwise it uses a stand-in for the few names that the
scripts use. The job is JSON on stdin, the result is JSON on stdout.
"""

import contextlib
import importlib.util
import io
import json
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent.parent
_CHECKOUT = os.environ.get("VYOS_1X", "")
REAL = bool(_CHECKOUT) and Path(_CHECKOUT).is_dir()
LIBRARY = "vyos-1x" if REAL else "stand-in"


def run(job):
    """Run a job in another process and return its result: `error`, `out`, `calls`, `result`."""
    ran = subprocess.run(
        [sys.executable, __file__], input=json.dumps(job), capture_output=True, text=True, timeout=90, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def has_cli_for_interfaces():
    """Return whether the vyos-1x under test itself has `vpp settings interface`."""
    return REAL and "interface" in _deep(_reference_of_vyos(), ["vpp", "settings"])


def work(job):
    """Run a job in this process."""
    sys.path.insert(0, str(ROOT / "python"))
    calls = []
    vyos = _real(job, calls) if REAL else _standin(job, calls)
    for name in job.get("absent", ()):
        sys.modules[name] = None
    out, error, result = io.StringIO(), None, None
    with contextlib.redirect_stdout(out):
        try:
            module = _load(Path(job["script"]))
            result = _commit(module, vyos, job) if "argv" not in job else _op_mode(module, vyos, job)
        except vyos.errors as caught:
            error = " ".join(f"{type(caught).__name__}: {caught}".split())  # vyos-1x breaks lines
    return {"error": error, "out": out.getvalue(), "calls": calls, "result": result}


def _commit(module, vyos, job):
    """Run the four verbs as configd does, with VPP and files where the test has them."""
    module.service_conf = job["conf"]
    module.vpp_confs = tuple(Path(path) for path in job.get("vpp_confs", ()))
    config = module.get_config(vyos.config(job["commands"]))
    if config is not None and "sockets" in job:
        api, status = job["sockets"]
        settings = config.settings
        settings = replace(
            settings, vpp=replace(settings.vpp, api_socket=api), status=replace(settings.status, socket=status)
        )
        config = replace(config, settings=settings)
    module.verify(config)
    module.generate(config)
    module.apply(config)


def _op_mode(module, vyos, job):
    from vppipsec.conf import settings

    settings.DEFAULT_CONFIG = Path(job["conf"])
    sys.argv = [module.__name__, *job["argv"]]
    sys.modules[module.__name__] = module
    return vyos.opmode(module)


def _load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _merged(theirs, ours):
    """Merge as vyos.xml_ref.update_cache does: the values of vyos-1x win."""
    for key, value in ours.items():
        if key not in theirs:
            theirs[key] = value
        elif isinstance(value, dict):
            _merged(theirs[key], value)
    return theirs


def _reference_of_vyos():
    return runpy.run_path(str(Path(_CHECKOUT, "python/vyos/xml_ref/pkg_cache/vyos_1x_cache.py")))["reference"]


def _real(job, calls):
    sys.path.insert(0, str(Path(_CHECKOUT) / "python"))
    reference = _merged(_reference_of_vyos(), job.get("vyos_has", {}))
    reference = _merged(reference, runpy.run_path(job["reference"])["reference"])
    module = sys.modules["vyos.xml_ref.cache"] = ModuleType("vyos.xml_ref.cache")
    module.reference = reference

    import vyos.defaults

    vyos.defaults.directories["templates"] = str(ROOT / "data" / "templates")  # before vyos.template reads it

    import vyos.config
    import vyos.configquery
    import vyos.configsource
    import vyos.configtree
    import vyos.opmode
    import vyos.utils.process
    import vyos.xml_ref

    vyos.utils.process.call = lambda command, *_, **__: calls.append(command) or 0

    def config(commands):
        tree = vyos.configtree.ConfigTree("")
        for line in commands.splitlines():
            words = line.split()[1:]
            path = words[:-1]
            if vyos.xml_ref.is_leaf(path) and not vyos.xml_ref.is_valueless(path):
                tree.set(path, value=words[-1], replace=not vyos.xml_ref.is_multi(path))
            else:
                tree.set(words)
            for end in range(2, len(words)):
                if vyos.xml_ref.is_tag(words[:end]):
                    tree.set_tag(words[:end])
        source = vyos.configsource.ConfigSourceString(session_config_text=tree.to_string())
        return vyos.config.Config(config_source=source)

    active = config(job.get("commands", ""))
    vyos.configquery.ConfigTreeQuery = lambda: SimpleNamespace(exists=active.exists)
    errors = (vyos.ConfigError, vyos.opmode.Error)
    return SimpleNamespace(config=config, errors=errors, opmode=vyos.opmode.run)


def _standin(job, calls):
    from vppipsec.conf.commands import parse_commands

    class ConfigError(Exception):
        pass

    class Error(Exception):
        pass

    def config(commands):
        tree = parse_commands(commands, "commands").tree

        def at(path):
            place = tree
            for name in path:
                place = place.get(name.replace("-", "_"), {}) if isinstance(place, dict) else {}
            return place

        return SimpleNamespace(
            get_config_dict=lambda path, **_: at(path),
            exists=lambda path: path[-1].replace("-", "_") in at(path[:-1]),
        )

    def render(destination, template, content):
        import jinja2

        loader = jinja2.FileSystemLoader(ROOT / "data" / "templates")
        environment = jinja2.Environment(loader=loader, trim_blocks=True)
        Path(destination).write_text(environment.get_template(template).render(content) + "\n")

    def opmode(module):
        from inspect import signature

        name, *options = sys.argv[1:]
        function = getattr(module, name)
        given = {"raw": False} | dict.fromkeys(signature(function).parameters)
        for option in options:
            key, _, value = option.removeprefix("--").partition("=")
            given[key] = value or True
        answer = function(**{key: given[key] for key in signature(function).parameters})
        return json.dumps(answer) if given["raw"] else answer

    def make(name, **names):
        module = sys.modules[name] = ModuleType(name)
        vars(module).update(names)
        return module

    opmode_errors = {
        name: type(name, (Error,), {}) for name in ("UnconfiguredSubsystem", "DataUnavailable", "IncorrectValue")
    }
    active = config(job.get("commands", ""))
    make("vyos", ConfigError=ConfigError, airbag=make("vyos.airbag", enable=lambda: None))
    make("vyos.base", Warning=lambda text: print(f"WARNING: {text}"))
    make("vyos.config", Config=lambda: active)
    make("vyos.configquery", ConfigTreeQuery=lambda: active)
    make("vyos.template", render=render)
    make("vyos.utils")
    make("vyos.utils.process", call=lambda command: calls.append(command) or 0)
    has = job.get("vyos_has", {})
    make("vyos.xml_ref", cli_defined=lambda path, name: name in _deep(has, path))
    sys.modules["vyos"].opmode = make("vyos.opmode", Error=Error, run=opmode, **opmode_errors)
    return SimpleNamespace(config=config, errors=(ConfigError, Error), opmode=opmode)


def _deep(tree, path):
    for name in path:
        tree = tree.get(name, {})
    return tree


if __name__ == "__main__":
    json.dump(work(json.load(sys.stdin)), sys.stdout)
