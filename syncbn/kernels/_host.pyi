from torch import Tensor

def learn_torch(exchange: object, tensor_class: type, /) -> None: ...
def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def use_instruction_set(name: str, /) -> None: ...
def local_moments(x: Tensor, wire: Tensor, status: tuple[float, ...], threads: int, /) -> bool: ...
def read_status(wire: Tensor, /) -> tuple[float, ...]: ...
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
    count_global: float,
    threads: int,
    /,
) -> bool: ...
def backward_sums(grad_y: Tensor, x: Tensor, stats: Tensor, wire: Tensor, threads: int, /) -> bool: ...
def parameter_gradients(wire: Tensor, grad_weight: Tensor | None, grad_bias: Tensor | None, /) -> None: ...
def backward_input(
    grad_y: Tensor,
    x: Tensor,
    grad_x: Tensor,
    wire: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    count_global: float,
    threads: int,
    /,
) -> bool: ...
