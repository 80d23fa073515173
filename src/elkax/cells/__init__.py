"""Recurrent cells, linear and nonlinear, and how to run them over sequences."""

from elkax.cells.convert import from_flax, from_torch
from elkax.cells.diagonal_complex import DiagonalComplex, ParamsDiagonalComplex
from elkax.cells.elman import Elman, ParamsElman
from elkax.cells.gilr import GILR, GILRLSTM, ParamsGILR, ParamsGILRLSTM, StateGILRLSTM
from elkax.cells.gru import GRU, DiagonalGRU, ParamsDiagonalGRU, ParamsGRU
from elkax.cells.lem import LEM, ParamsLEM, StateLEM
from elkax.cells.linear import Linear, ParamsLinear
from elkax.cells.lstm import LSTM, DiagonalLSTM, ParamsLSTM, StateLSTM
from elkax.cells.minimal import MinGRU, MinLSTM, ParamsMinGRU, ParamsMinLSTM
from elkax.cells.protocol import Cell, LinearCell, ReadCell
from elkax.cells.qrnn import QRNN, ParamsQRNN, StateQRNN
from elkax.cells.rg_lru import RGLRU, ParamsRGLRU
from elkax.cells.run import CellRun, run
from elkax.cells.sru import SRU, ParamsSRU
from elkax.cells.timeline import Timeline

__all__ = [
    "GILR",
    "GILRLSTM",
    "GRU",
    "LEM",
    "LSTM",
    "QRNN",
    "RGLRU",
    "SRU",
    "Cell",
    "CellRun",
    "DiagonalComplex",
    "DiagonalGRU",
    "DiagonalLSTM",
    "Elman",
    "Linear",
    "LinearCell",
    "MinGRU",
    "MinLSTM",
    "ParamsDiagonalComplex",
    "ParamsDiagonalGRU",
    "ParamsElman",
    "ParamsGILR",
    "ParamsGILRLSTM",
    "ParamsGRU",
    "ParamsLEM",
    "ParamsLSTM",
    "ParamsLinear",
    "ParamsMinGRU",
    "ParamsMinLSTM",
    "ParamsQRNN",
    "ParamsRGLRU",
    "ParamsSRU",
    "ReadCell",
    "StateGILRLSTM",
    "StateLEM",
    "StateLSTM",
    "StateQRNN",
    "Timeline",
    "from_flax",
    "from_torch",
    "run",
]
