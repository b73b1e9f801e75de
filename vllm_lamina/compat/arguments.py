"""``--executor lamina`` and ``--lamina-*``: vLLM has no extension point for engine arguments, so EngineArgs is wrapped.

The wrapping happens when ``vllm.engine.arg_utils`` is imported, whoever imports it, and changes nothing for an engine
that does not select Lamina. It fails loudly: were the wrapped interface to change, importing vLLM with the plugin
installed would raise here.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from vllm_lamina.compat.versions import check_vllm_version
from vllm_lamina.config import LaminaConfig
from vllm_lamina.errors import ConfigError

logger = logging.getLogger("vllm.lamina")

EXECUTOR = "vllm_lamina.executor.LaminaExecutor"
"""Value of vLLM's ``distributed_executor_backend`` that selects Lamina."""

_MODULE = "vllm.engine.arg_utils"
_PREFIX = "lamina_"


_check: Callable[[Any], None]
_prepare: Callable[[Any], None]
"""What `install` was given."""


def install(check: Callable[[Any], None], prepare: Callable[[Any], None]) -> None:
    """Wrap vLLM's engine arguments now, or as soon as they are imported. Calling it again does nothing.

    Parameters
    ----------
    check
        Called with the ``EngineArgs`` of each engine that selects Lamina, before vLLM looks at them.
    prepare
        Called with the ``VllmConfig`` of each engine that selects Lamina, once vLLM has made it; here, in the first
        process, an error reaches the user before any other process has started.
    """
    global _check, _prepare
    _check, _prepare = check, prepare
    module = sys.modules.get(_MODULE)
    if module is not None:
        if hasattr(module, "AsyncEngineArgs"):
            _wrap(module)
        else:
            module.__class__ = _WrapOnUse
    elif not any(isinstance(finder, _WrapOnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WrapOnImport())


class _WrapOnImport(importlib.abc.MetaPathFinder):
    """Wraps the module of vLLM's engine arguments right after it has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _wrap(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


class _WrapOnUse(ModuleType):
    """The module of vLLM's engine arguments while it is being executed, up to the first use of one of its classes.

    Where it is the first of vLLM that a program imports, vLLM asks for its platform in the middle of that import.
    """

    def __getattribute__(self, name: str) -> Any:
        if name in ("EngineArgs", "AsyncEngineArgs") and "AsyncEngineArgs" in vars(self):
            self.__class__ = ModuleType  # type: ignore[assignment]
            _wrap(self)
        return ModuleType.__getattribute__(self, name)


def _wrap(module: ModuleType) -> None:
    engine_args = module.EngineArgs
    if hasattr(engine_args, "lamina_wrapped"):
        return
    engine_args.lamina_wrapped = True
    _wrap_flags(engine_args)
    for cls in (engine_args, module.AsyncEngineArgs):
        _wrap_init(cls)
    _wrap_model(engine_args)
    _wrap_create(engine_args)


def _wrap_flags(engine_args: Any) -> None:
    add_cli_args = engine_args.add_cli_args
    from_cli_args = engine_args.from_cli_args.__func__

    def add_lamina_args(parser: Any) -> Any:
        _refuse_misspelt_flags(parser)
        parser = add_cli_args(parser)
        group = parser.add_argument_group(
            "Lamina",
            "Model-attention disaggregation: the attention operator and the KV cache on attention workers.",
        )
        group.add_argument(
            "--executor",
            choices=["lamina"],
            default=None,
            help="Run the attention operator and keep the KV cache on attention workers.",
        )
        for field in dataclasses.fields(LaminaConfig):
            group.add_argument(
                f"--{_PREFIX}{field.name}".replace("_", "-"),
                type=type(field.default),
                default=field.default,
                help=field.metadata["help"],
            )
        return parser

    def from_cli_args_with_lamina(cls: Any, args: Any) -> Any:
        engine = from_cli_args(cls, args)
        _select(engine, _given_flags(args))
        return engine

    engine_args.add_cli_args = staticmethod(add_lamina_args)
    engine_args.from_cli_args = classmethod(from_cli_args_with_lamina)


def _refuse_misspelt_flags(parser: Any) -> None:
    """Refuse a misspelt flag of ours here, from the command line or a file: argparse would only say it is unknown."""
    valid = ["--" + (_PREFIX + field.name).replace("_", "-") for field in dataclasses.fields(LaminaConfig)]
    parse_known_args = parser.parse_known_args

    def parse(*args: Any, **kwargs: Any) -> Any:
        namespace, unknown = parse_known_args(*args, **kwargs)
        for argument in unknown:
            flag = argument.partition("=")[0]
            if flag.startswith("--lamina-"):
                nearest = difflib.get_close_matches(flag, valid, n=1, cutoff=0.0)[0]
                parser.error(
                    f"unknown option {flag}; did you mean {nearest}? Valid options: {', '.join(valid)}"
                )
        return namespace, unknown

    parser.parse_known_args = parse


def _wrap_init(cls: Any) -> None:
    init = cls.__init__

    @functools.wraps(init)
    def init_with_lamina(self: Any, *args: Any, **kwargs: Any) -> None:
        ours = {
            name: kwargs.pop(name) for name in list(kwargs) if name == "executor" or name.startswith(_PREFIX)
        }
        init(self, *args, **kwargs)
        _select(self, ours)

    cls.__init__ = init_with_lamina


def _wrap_model(engine_args: Any) -> None:
    create_model_config = engine_args.create_model_config

    @functools.wraps(create_model_config)
    def create_and_settle(self: Any) -> Any:
        model = create_model_config(self)
        if self.distributed_executor_backend == EXECUTOR and model.is_hybrid:
            _settle_prefix_caching(self)
        return model

    engine_args.create_model_config = create_and_settle


def _wrap_create(engine_args: Any) -> None:
    create_engine_config = engine_args.create_engine_config

    @functools.wraps(create_engine_config)
    def create_and_check(self: Any, *args: Any, **kwargs: Any) -> Any:
        selected = self.distributed_executor_backend == EXECUTOR
        if not selected and "lamina" in (self.additional_config or {}):
            raise ConfigError(
                'additional_config["lamina"] needs --executor lamina (or --distributed-executor-backend '
                f"{EXECUTOR}); remove it to run without Lamina"
            )
        if selected:
            check_vllm_version()
            LaminaConfig.from_additional_config(self.additional_config)
            _refuse_what_lamina_chooses(self)
            _check(self)
            _ignore_async_scheduling(self)
            _let_children_import_as_we_do()
        config = create_engine_config(self, *args, **kwargs)
        if selected:
            _restore_latent_settings(config, self)
            _prepare(config)
        return config

    engine_args.create_engine_config = create_and_check


def _refuse_what_lamina_chooses(engine: Any) -> None:
    """Refuse what a user chose of vLLM's that Lamina replaces; in the configuration it could be vLLM's own choice."""
    attention = engine.attention_config
    for flag, given, own in (
        ("--attention-backend", _unless_auto(engine.attention_backend), "attention backend"),
        ("--attention-config", attention.backend or attention.backend_per_kind or None, "attention backend"),
        ("--worker-cls", _unless_auto(engine.worker_cls), "model worker"),
    ):
        if given is not None:
            raise ConfigError(f"--executor lamina has its own {own}; remove {flag} (given: {given})")


def _settle_prefix_caching(engine: Any) -> None:
    """Let a hybrid model have no prefix cache, unless the user says something of it, or of the states that it keeps.

    Before vLLM turns it on, which is its default: it derives the states' blocks from that.
    """
    says_nothing = engine.enable_prefix_caching is None and engine.mamba_block_size is None
    if says_nothing and engine.mamba_cache_mode in (None, "none"):
        engine.enable_prefix_caching = False
        logger.info(
            "Lamina: prefix caching is off: hybrid models have none here (--no-enable-prefix-caching)."
        )


def _restore_latent_settings(config: Any, engine: Any) -> None:
    # It imports vLLM's configuration, which imports us, as a plugin.
    from vllm_lamina.compat.latent_attention import restore_settings

    if restore_settings(config, engine):
        logger.info(
            "Lamina: chunked prefill, the prefix cache and --block-size are as you say, or vLLM's defaults: what vLLM "
            "says of MLA above is true of its own attention backend for CPUs."
        )


def _ignore_async_scheduling(engine: Any) -> None:
    """Accept the flag as vLLM does on CPUs, where it has none either; with this executor vLLM would refuse it."""
    if engine.async_scheduling:
        logger.info(
            "Lamina: --async-scheduling has no effect: --lamina-batches says how many steps are in flight."
        )
        engine.async_scheduling = None


def _unless_auto(value: Any) -> Any:
    return None if str(value).lower() == "auto" else value


def _let_children_import_as_we_do() -> None:
    """Keep the working directory from what other Python processes import, unless this one imports from it too.

    vLLM asks a ``python -m`` of its own about the model's class, which would look there first: for our plugin, too.
    """
    if os.getcwd() not in map(os.path.realpath, sys.path):
        os.environ["PYTHONSAFEPATH"] = "1"


def _given_flags(args: Any) -> dict[str, Any]:
    """Our flags that differ from their defaults; a caller's own namespace may lack them."""
    defaults = {"executor": None} | {_PREFIX + f.name: f.default for f in dataclasses.fields(LaminaConfig)}
    return {
        name: getattr(args, name)
        for name, default in defaults.items()
        if getattr(args, name, default) != default
    }


def _select(engine: Any, given: dict[str, Any]) -> None:
    """Turn the given arguments of ours into the two of vLLM's that carry them."""
    backend = engine.distributed_executor_backend
    if isinstance(backend, type) and backend.__module__.startswith("vllm_lamina."):
        backend = engine.distributed_executor_backend = EXECUTOR  # vLLM takes the class, too
    executor = given.pop("executor", None)
    if executor not in (None, "lamina"):
        raise ConfigError(f"unknown executor {executor!r}; the only one is 'lamina'")
    options = {name.removeprefix(_PREFIX): value for name, value in given.items()}
    if executor is None:
        if options:
            flag = "--lamina-" + next(iter(options)).replace("_", "-")
            raise ConfigError(f"{flag} needs --executor lamina")
        return
    if backend == "ray":
        raise ConfigError(
            "--distributed-executor-backend ray would run the model workers on Ray, which --executor lamina does not "
            "do (nor does vLLM on CPU): remove it; --lamina-ray runs the attention workers there"
        )
    if backend not in (None, EXECUTOR):
        raise ConfigError(
            f"--executor lamina selects its own executor; remove --distributed-executor-backend {backend}"
        )
    LaminaConfig.from_mapping(options)
    engine.distributed_executor_backend = EXECUTOR
    additional = dict(engine.additional_config or {})
    additional["lamina"] = {**additional.get("lamina", {}), **options}
    engine.additional_config = additional
