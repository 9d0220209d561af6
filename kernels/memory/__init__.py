"""Miras: associative memories that learn at test time, as four choices (`MemoryRule`), and Moneta, Yaad and Memora."""

from kernels.memory.bias import DotProduct, Huber, LpError, ShiftRobust, SquaredError
from kernels.memory.forms import MemoryState, initial_memory, miras
from kernels.memory.modules import MLP, Matrix, Vector
from kernels.memory.named import memora, moneta, yaad
from kernels.memory.proximal import ElasticNet, ElasticNetFTRL, FDivergence
from kernels.memory.retention import Bregman, Decay, Entropy, LqStability, NoRetention
from kernels.memory.rule import MemoryRule

__all__ = [
    "MLP",
    "Bregman",
    "Decay",
    "DotProduct",
    "ElasticNet",
    "ElasticNetFTRL",
    "Entropy",
    "FDivergence",
    "Huber",
    "LpError",
    "LqStability",
    "Matrix",
    "MemoryRule",
    "MemoryState",
    "NoRetention",
    "ShiftRobust",
    "SquaredError",
    "Vector",
    "initial_memory",
    "memora",
    "miras",
    "moneta",
    "yaad",
]
