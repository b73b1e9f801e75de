"""Entry points through which vLLM finds Lamina; nothing changes for an engine that does not select it."""


def platform_plugin() -> None:
    """Offer ``--executor lamina``: vLLM asks platform plugins before it imports its engine arguments.

    Returning None says that this is not a platform, so that vLLM goes on with its own.
    """
    from vllm_lamina.compat import arguments

    arguments.install()


def general_plugin() -> None:
    """Offer ``--executor lamina`` where vLLM was told its platform and asked no platform plugin."""
    platform_plugin()
