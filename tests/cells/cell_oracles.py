"""Steps of cells in NumPy, from the equations of their papers, and loops over them."""

import jax
import numpy as np

from elkax import cells


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def linear(cell, p, s, x):
    s = p.recurrent_weights @ s + p.input_weights @ x + p.bias
    return s, s


def elman(cell, p, h, x):
    h = np.tanh(p.recurrent_weights @ h + p.input_weights @ x + p.bias)
    return h, h


def gru(cell, p, h, x):
    U, W, b = p.recurrent_weights, p.input_weights, p.bias
    r = sigmoid(U[0] @ h + W[0] @ x + b[0])
    z = sigmoid(U[1] @ h + W[1] @ x + b[1])
    if cell.reset == "after":
        n = np.tanh(W[2] @ x + b[2] + r * (U[2] @ h + p.recurrent_bias))
    else:
        n = np.tanh(W[2] @ x + b[2] + U[2] @ (r * h))
    h = (1 - z) * n + z * h
    return h, h


def diagonal_gru(cell, p, h, x):
    whole = cells.ParamsGRU([np.diag(u) for u in p.recurrent_weights], *p[1:], None)
    return gru(cells.GRU(cell.input_dim, cell.state_dim, "before"), whole, h, x)


def lstm(cell, p, state, x):
    c, h = state.cell, state.hidden
    i, f, g, o = (p.recurrent_weights[k] @ h + p.input_weights[k] @ x + p.bias[k] for k in range(4))
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    h = sigmoid(o) * np.tanh(c)
    return cells.StateLSTM(cell=c, hidden=h), h


def diagonal_lstm(cell, p, state, x):
    whole = p._replace(recurrent_weights=[np.diag(u) for u in p.recurrent_weights])
    return lstm(cell, whole, state, x)


def lem(cell, p, state, x):
    z, y = state.memory, state.hidden
    W, V, b, dt = p.recurrent_weights, p.input_weights, p.bias, cell.time_step
    step = dt * sigmoid(W[0] @ y + V[0] @ x + b[0])
    other = dt * sigmoid(W[1] @ y + V[1] @ x + b[1])
    z = (1 - step) * z + step * np.tanh(W[2] @ y + V[2] @ x + b[2])
    y = (1 - other) * y + other * np.tanh(W[3] @ z + V[3] @ x + b[3])
    return cells.StateLEM(memory=z, hidden=y), y


def gilr(cell, p, h, x):
    g = sigmoid(p.input_weights[0] @ x + p.bias[0])
    i = np.tanh(p.input_weights[1] @ x + p.bias[1])
    h = g * h + (1 - g) * i
    return h, h


def gilr_lstm(cell, p, state, x):
    h, c = state.surrogate, state.cell
    i, f, z, o = (p.recurrent_weights[k] @ h + p.input_weights[k] @ x + p.bias[k] for k in range(4))
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(z)
    h, _ = gilr(cell, p.surrogate, h, x)
    return cells.StateGILRLSTM(surrogate=h, cell=c), sigmoid(o) * c


def sru(cell, p, c, x):
    f = sigmoid(p.gate_weights[0] @ x + p.bias[0])
    r = sigmoid(p.gate_weights[1] @ x + p.bias[1])
    c = f * c + (1 - f) * (p.candidate_weights @ x)
    skip = x if cell.input_dim == cell.state_dim else p.skip_weights @ x
    return c, r * c + (1 - r) * skip


def qrnn(cell, p, state, x):
    taps = [x, *state.window]
    z, f, o = (
        p.bias[gate] + sum(p.input_weights[j][gate] @ taps[j] for j in range(cell.width))
        for gate in range(3)
    )
    c = sigmoid(f) * state.cell + (1 - sigmoid(f)) * np.tanh(z)
    window = np.reshape(taps[: cell.width - 1], (cell.width - 1, cell.input_dim))
    return cells.StateQRNN(cell=c, window=window), sigmoid(o) * c


def min_gru(cell, p, h, x):
    z = sigmoid(p.input_weights[0] @ x + p.bias[0])
    h = (1 - z) * h + z * (p.input_weights[1] @ x + p.bias[1])
    return h, h


def min_lstm(cell, p, h, x):
    f = sigmoid(p.input_weights[0] @ x + p.bias[0])
    i = sigmoid(p.input_weights[1] @ x + p.bias[1])
    h = f / (f + i) * h + i / (f + i) * (p.input_weights[2] @ x + p.bias[2])
    return h, h


def rg_lru(cell, p, h, x):
    u = x if cell.input_dim == cell.state_dim else p.input_weights @ x
    r = sigmoid(p.gate_weights[0] @ u + p.bias[0])
    i = sigmoid(p.gate_weights[1] @ u + p.bias[1])
    a = sigmoid(p.decay_logit) ** (cell.sharpness * r)
    h = a * h + np.sqrt(1 - a**2) * (i * u)
    return h, h


def diagonal_complex(cell, p, s, x):
    B, C = (w[0] + 1j * w[1] for w in (p.input_weights, p.output_weights))
    decay = np.exp(-np.exp(p.log_rate) + 1j * np.exp(p.log_phase))
    s = decay * s + np.exp(p.log_gain) * (B @ x)
    return s, (C @ s).real + p.skip_weights @ x


STEPS = {
    cells.Linear: linear,
    cells.Elman: elman,
    cells.GRU: gru,
    cells.DiagonalGRU: diagonal_gru,
    cells.LSTM: lstm,
    cells.DiagonalLSTM: diagonal_lstm,
    cells.GILR: gilr,
    cells.GILRLSTM: gilr_lstm,
    cells.SRU: sru,
    cells.QRNN: qrnn,
    cells.MinGRU: min_gru,
    cells.MinLSTM: min_lstm,
    cells.LEM: lem,
    cells.RGLRU: rg_lru,
    cells.DiagonalComplex: diagonal_complex,
}


def loop(cell, params, inputs, start):
    """Outputs and states of one sequence, lists of T."""
    params, state = jax.tree.map(np.asarray, (params, start))
    outputs, states = [], []
    for x in np.asarray(inputs):
        state, output = STEPS[type(cell)](cell, params, state, x)
        outputs.append(output)
        states.append(state)
    return outputs, states


def run(cell, params, inputs, start, resets, length, reverse):
    """Sequences cut at resets and at the length, turned round where asked, and run one by one.

    Returns outputs of the steps that exist, states of all steps, and the final state.
    """
    inputs, flags = np.asarray(inputs)[:length], np.asarray(resets)[:length]
    if reverse:
        inputs, flags = inputs[::-1], flags[::-1]
    borders = [0, *(t for t in range(1, length) if flags[t]), length]
    outputs, states = [], []
    for begin, end in zip(borders[:-1], borders[1:], strict=True):
        some = loop(cell, params, inputs[begin:end], start)
        outputs, states = outputs + some[0], states + some[1]
    start = jax.tree.map(np.asarray, start)
    final = states[-1] if states else start
    padding = [start if reverse else final] * (len(resets) - length)
    if reverse:
        outputs, states = outputs[::-1], states[::-1]
    return outputs, states + padding, final
