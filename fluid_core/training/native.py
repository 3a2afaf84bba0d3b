"""DeepSpeed without C++ extensions on CPU.

DeepSpeed would compile a shared-memory all-reduce on first use. It serves inference alone (`inference_all_reduce`), so training
loses nothing without it, and wins: no compiler is needed, workers start half a minute sooner on a fresh machine, and a
process killed during the build cannot leave the lock for which torch lets all later ones wait for ever.
"""


def without_extensions() -> None:
    """To be called before `deepspeed.init_distributed`, in every process."""
    import deepspeed.ops

    # Also skips the probing of all of DeepSpeed's operators, which starts compilers.
    deepspeed.ops.__dict__["__compatible_ops__"] = {}
