from torch import Tensor

from syncbn.moments import Numbers

def learn_torch(exchange: object, tensor_class: type, /) -> None: ...
def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def use_instruction_set(name: str, /) -> None: ...
def sound(
    x: object,
    weight: object,
    bias: object,
    running_mean: object,
    running_var: object,
    num_batches_tracked: object,
    C: int,
    /,
) -> bool: ...
def local_moments(x: Tensor, wire: Tensor, numbers: Numbers, status: tuple[float, ...], threads: int, /) -> bool: ...
def read_counters(wire: Tensor, numbers: Numbers, /) -> tuple[bool, float, tuple[float, ...]]: ...
def agreement(wire: Tensor, numbers: Numbers, ranks: int, /) -> int: ...
def check_sums(wire: Tensor, numbers: Numbers, /) -> bool: ...
def normalize(
    x: Tensor,
    y: Tensor,
    wire: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    threads: int,
    /,
) -> bool: ...
def backward_sums(
    grad_y: Tensor, x: Tensor, stats: Tensor, wire: Tensor, numbers: Numbers, threads: int, /
) -> bool: ...
def parameter_gradients(wire: Tensor, grad_weight: Tensor | None, grad_bias: Tensor | None, /) -> None: ...
def backward_input(
    grad_y: Tensor,
    x: Tensor,
    grad_x: Tensor,
    wire: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    threads: int,
    /,
) -> bool: ...
