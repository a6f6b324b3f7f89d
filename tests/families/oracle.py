"""The gated byte-level RNN once more, slowly: an oracle for the fast one.

Written from specs/dynamics.md alone (1.1 to 1.5 the network and what learns, 2.3 one training step), in double
precision, on plain lists, one example at a time. It knows nothing of rnnq, torch or numpy, and must stay so: what it
agrees with, it agrees with independently. `python tests/families/oracle.py` checks it against itself.

The words used throughout:

    flags    dict      each name of FLAGS -> bool
    params   dict      array name -> nested lists; `shapes` lists the names. A weight has a row per output and a column
                       per input, in the order in which the spec concatenates the inputs
    grads    dict      the names of params -> an array of the same shape, or None where no gradient arrives at all
    state    list      one list[S] per layer, the bottom layer first
"""

import math
import random
import time

VOCABULARY = 256
FLAGS = (
    "use_input_gate",
    "use_forget_gate",
    "use_output_gate",
    "use_state_gate",
    "use_new_state",
    "use_old_state",
    "use_residual",
)


# --- The parameters -------------------------------------------------------------------------------------------------


def linears(flags, n_layers, state_size):
    """Every affine map that the flags call for: name -> (outputs, inputs), in the draw order of spec 1.3."""
    if not (flags["use_new_state"] or flags["use_old_state"]):
        raise ValueError("the output must read the new state, the old state or both")
    size = state_size
    read = size * (flags["use_new_state"] + flags["use_old_state"] + flags["use_residual"])  # |z|
    layer = {"state": (size, 2 * size), "out": (size, read)}
    if flags["use_input_gate"]:
        layer["input_gate"] = (size, 2 * size)
        layer["state_input_gate"] = (size, 2 * size)
    if flags["use_state_gate"]:
        layer["state_gate"] = (size, 3 * size)
    if flags["use_forget_gate"]:
        layer["forget_gate"] = (size, 3 * size)
    if flags["use_output_gate"]:
        layer["output_gate"] = (size, size + read)
    maps = {"embed": (size, VOCABULARY), "head": (VOCABULARY, size)}
    for index in range(n_layers):
        maps |= {f"layers.{index}.{name}": shape for name, shape in layer.items()}
    return maps


def shapes(flags, n_layers, state_size):
    """Every parameter array: name -> (outputs, inputs) for a weight, (outputs,) for a bias; weight before bias."""
    arrays = {}
    for name, (outputs, inputs) in linears(flags, n_layers, state_size).items():
        arrays[f"{name}.weight"] = (outputs, inputs)
        arrays[f"{name}.bias"] = (outputs,)
    return arrays


def parameter_count(flags, n_layers, state_size):
    """The number of parameters, counted array by array (spec 1.4 has it as a formula)."""
    return sum(math.prod(shape) for shape in shapes(flags, n_layers, state_size).values())


def draw(flags, n_layers, state_size, seed, bound=None):
    """Parameters from U(-bound, bound); without `bound`, 1/sqrt(inputs of the affine map), as in spec 1.3."""
    rng = random.Random(seed)
    params = {}
    for name, (outputs, inputs) in linears(flags, n_layers, state_size).items():
        limit = 1 / math.sqrt(inputs) if bound is None else bound
        params[f"{name}.weight"] = [[rng.uniform(-limit, limit) for _ in range(inputs)] for _ in range(outputs)]
        params[f"{name}.bias"] = [rng.uniform(-limit, limit) for _ in range(outputs)]
    return params


def zero_state(n_layers, state_size):
    """The state at the beginning of a window, for one example."""
    return [[0.0] * state_size for _ in range(n_layers)]


# --- A small reverse mode -------------------------------------------------------------------------------------------


class Vector:
    """A list of numbers, and the gradient of the loss with respect to it: None until some arrives."""

    __slots__ = ("grad", "value")

    def __init__(self, value):
        self.value = list(value)
        self.grad = None

    def receive(self, grad):
        """Add what one of the readers of this vector sends back."""
        self.grad = grad if self.grad is None else [a + b for a, b in zip(self.grad, grad, strict=True)]


class Tape:
    """What was computed from what, in order, so that it can be walked backwards.

    Each step is (result, pull). `pull(grad, grads)` gets the gradient with respect to the result; it hands it on to the
    vectors that were read, and adds to `grads` for the parameters that were. A result whose gradient never arrived is
    not pulled: this is how a parameter comes to have no gradient, which is not the same as a gradient of zero.
    """

    def __init__(self, params):
        self.params = params
        self.steps = []
        self.output = None  # the logits, once `forward` has them

    def keep(self, value, pull):
        result = Vector(value)
        self.steps.append((result, pull))
        return result

    def backward(self, grad, grads):
        """Add to `grads` the gradient of every parameter, given that with respect to the output. Good for one use."""
        self.output.receive(grad)
        for result, pull in reversed(self.steps):
            if result.grad is not None:
                pull(result.grad, grads)

    def embed(self, byte):
        """W·onehot(byte) + b: one column of the weight.    (S)"""
        weight, bias = self.params["embed.weight"], self.params["embed.bias"]

        def pull(grad, grads):
            if grads["embed.weight"] is None:
                grads["embed.weight"] = [[0.0] * len(row) for row in weight]
            for row, g in zip(grads["embed.weight"], grad, strict=True):
                row[byte] += g
            add_vector(grads, "embed.bias", grad)

        return self.keep([row[byte] + b for row, b in zip(weight, bias, strict=True)], pull)

    def linear(self, name, x):
        """W·x + b.    (inputs) -> (outputs)"""
        weight, bias = self.params[f"{name}.weight"], self.params[f"{name}.bias"]

        def pull(grad, grads):
            add_outer(grads, f"{name}.weight", grad, x.value)
            add_vector(grads, f"{name}.bias", grad)
            x.receive([dot(column, grad) for column in zip(*weight, strict=True)])

        return self.keep([dot(row, x.value) + b for row, b in zip(weight, bias, strict=True)], pull)

    def concat(self, *parts):
        """[a; b; ...] in the order given."""

        def pull(grad, _):
            start = 0
            for part in parts:
                part.receive(grad[start : start + len(part.value)])
                start += len(part.value)

        return self.keep([v for part in parts for v in part.value], pull)

    def add(self, a, b):
        def pull(grad, _):
            a.receive(grad)
            b.receive(grad)

        return self.keep([v + w for v, w in zip(a.value, b.value, strict=True)], pull)

    def mul(self, a, b):
        """Elementwise."""

        def pull(grad, _):
            a.receive([g * w for g, w in zip(grad, b.value, strict=True)])
            b.receive([g * v for g, v in zip(grad, a.value, strict=True)])

        return self.keep([v * w for v, w in zip(a.value, b.value, strict=True)], pull)

    def one_minus(self, a):
        def pull(grad, _):
            a.receive([-g for g in grad])

        return self.keep([1 - v for v in a.value], pull)

    def sigmoid(self, a):
        value = [logistic(v) for v in a.value]

        def pull(grad, _):
            a.receive([g * s * (1 - s) for g, s in zip(grad, value, strict=True)])

        return self.keep(value, pull)

    def tanh(self, a):
        value = [math.tanh(v) for v in a.value]

        def pull(grad, _):
            a.receive([g * (1 - t * t) for g, t in zip(grad, value, strict=True)])

        return self.keep(value, pull)


def dot(a, b):
    return sum([v * w for v, w in zip(a, b, strict=True)])


def logistic(v):
    """1 / (1 + exp(-v)), without overflow for a large negative v."""
    if v >= 0:
        return 1 / (1 + math.exp(-v))
    e = math.exp(v)
    return e / (1 + e)


def add_vector(grads, name, grad):
    """grads[name] += grad; the first to arrive takes the place of None."""
    if grads[name] is None:
        grads[name] = list(grad)
    else:
        grads[name] = [total + g for total, g in zip(grads[name], grad, strict=True)]


def add_outer(grads, name, grad, x):
    """grads[name] += grad · xᵀ; the first to arrive takes the place of None.    (outputs), (inputs)"""
    if grads[name] is None:
        grads[name] = [[g * v for v in x] for g in grad]
    else:
        rows = zip(grads[name], grad, strict=True)
        grads[name] = [[total + g * v for total, v in zip(row, x, strict=True)] for row, g in rows]


# --- The network ----------------------------------------------------------------------------------------------------


def layer(tape, flags, name, x, h):
    """One layer, as spec 1.2 writes it.    x, h (S) -> y (S), n (S)

    The state gate mixes with the raw h, not with the read-gated h_in; the residual is the raw x, not the gated one.
    """
    h_in = h
    c = tape.concat(x, h)
    if flags["use_input_gate"]:
        u = tape.sigmoid(tape.linear(f"{name}.input_gate", c))
        r = tape.sigmoid(tape.linear(f"{name}.state_input_gate", c))
        h_in = tape.mul(r, h)
        c = tape.concat(tape.mul(u, x), h_in)
    n = tape.tanh(tape.linear(f"{name}.state", c))
    if flags["use_state_gate"]:
        g = tape.sigmoid(tape.linear(f"{name}.state_gate", tape.concat(c, n)))
        n = tape.add(tape.mul(g, n), tape.mul(tape.one_minus(g), h))
    if flags["use_forget_gate"]:
        f = tape.sigmoid(tape.linear(f"{name}.forget_gate", tape.concat(c, n)))
        n = tape.mul(f, n)
    return output(tape, flags, name, n, h_in, x), n


def output(tape, flags, name, n, h_in, x):
    """What a layer hands upwards.    n, h_in, x (S) -> y (S)"""
    read = []
    if flags["use_new_state"]:
        read.append(n)
    if flags["use_old_state"]:
        read.append(h_in)
    if flags["use_residual"]:
        read.append(x)
    z = tape.concat(*read)
    o = tape.linear(f"{name}.out", z)
    if flags["use_output_gate"]:
        return tape.mul(o, tape.sigmoid(tape.linear(f"{name}.output_gate", tape.concat(o, z))))
    return tape.mul(o, tape.sigmoid(o))


def forward(params, flags, n_layers, state, byte):
    """One byte of one example.

    state    n_layers x (S)
    byte     0..255
    returns  logits (256), the new state n_layers x (S), the tape

    States go in and come out as plain numbers: no gradient flows through time.
    """
    tape = Tape(params)
    x = tape.embed(byte)
    new_state = []
    for index, h in zip(range(n_layers), state, strict=True):
        x, n = layer(tape, flags, f"layers.{index}", x, Vector(h))
        new_state.append(list(n.value))
    tape.output = tape.linear("head", x)
    return list(tape.output.value), new_state, tape


def cross_entropy(logits, byte):
    """-log softmax(logits)[byte] in nats, and its gradient with respect to the logits.    (256) -> (), (256)"""
    top = max(logits)
    weights = [math.exp(v - top) for v in logits]
    total = sum(weights)
    grad = [w / total for w in weights]
    grad[byte] -= 1
    return math.log(total) + top - logits[byte], grad


def loss_and_gradients(params, flags, n_layers, states, bytes_in, bytes_out):
    """One time step of a batch.

    states              B x n_layers x (S)
    bytes_in, bytes_out (B), 0..255
    returns             the mean cross-entropy in nats, grads, the new states B x n_layers x (S)
    """
    batch = len(states)
    loss, grads, new_states = 0.0, dict.fromkeys(params), []
    for state, byte, target in zip(states, bytes_in, bytes_out, strict=True):
        logits, new_state, tape = forward(params, flags, n_layers, state, byte)
        example_loss, grad = cross_entropy(logits, target)
        tape.backward([g / batch for g in grad], grads)
        loss += example_loss / batch
        new_states.append(new_state)
    return loss, grads, new_states


def loss_only(params, flags, n_layers, states, bytes_in, bytes_out):
    """The loss of `loss_and_gradients`, without walking backwards."""
    total = 0.0
    for state, byte, target in zip(states, bytes_in, bytes_out, strict=True):
        total += cross_entropy(forward(params, flags, n_layers, state, byte)[0], target)[0]
    return total / len(states)


# --- The optimiser --------------------------------------------------------------------------------------------------


def adam_step(params, grads, moments, step, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8):
    """One step of Adam, without weight decay.

    moments  dict      name -> (first, second), in the shape of the parameter; {} before the first step
    step     int       the number of this step, from 1
    returns            the new params and the new moments; what was given is left as it was

    A parameter whose gradient is None is skipped: it gets no moments and keeps its value. (torch.optim.Adam counts
    steps per parameter. One count for all is the same here, as what has no gradient once has none at any step.)
    """
    rate, scale = lr / (1 - beta1**step), math.sqrt(1 - beta2**step)
    new_params, new_moments = dict(params), dict(moments)
    for name, grad in grads.items():
        if grad is None:
            continue
        first, second = moments.get(name) or (mapped(lambda _: 0.0, grad), mapped(lambda _: 0.0, grad))
        first = mapped(lambda m, g: beta1 * m + (1 - beta1) * g, first, grad)
        second = mapped(lambda v, g: beta2 * v + (1 - beta2) * g * g, second, grad)
        new_moments[name] = first, second
        new_params[name] = mapped(
            lambda p, m, v: p - rate * m / (math.sqrt(v) / scale + eps), params[name], first, second
        )
    return new_params, new_moments


def mapped(function, *arrays):
    """`function` of each element of vectors or matrices of one shape."""
    if isinstance(arrays[0][0], list):
        return [mapped(function, *rows) for rows in zip(*arrays, strict=True)]
    return [function(*elements) for elements in zip(*arrays, strict=True)]


# --- The self test --------------------------------------------------------------------------------------------------


def every_flags():
    """The 96 combinations that the family allows, in the enumeration order of spec 1.6."""
    for code in range(2 ** len(FLAGS)):
        flags = {name: not code >> place & 1 for place, name in zip(range(6, -1, -1), FLAGS, strict=True)}
        if flags["use_new_state"] or flags["use_old_state"]:
            yield flags


def from_code(code):
    """Flags from the spec's short form, for example `.F.SN.R`."""
    return {name: letter != "." for name, letter in zip(FLAGS, code, strict=True)}


def as_code(flags):
    return "".join(letter if flags[name] else "." for letter, name in zip("IFOSNLR", FLAGS, strict=True))


def absent_by_the_spec(flags, n_layers, names):
    """The parameters that learn nothing, as the prose of spec 1.5 has it (and not as a tape finds it)."""
    if flags["use_new_state"]:
        return set()
    frozen = ("state", "state_gate", "forget_gate", "input_gate")
    absent = {name for name in names if name.startswith("layers.") and name.split(".")[2] in frozen}
    if not (flags["use_residual"] or flags["use_input_gate"]):
        top = f"layers.{n_layers - 1}."
        absent |= {name for name in names if not name.startswith((top, "head."))}
    return absent


def count_by_the_spec(flags, n_layers, state_size):
    """The formula of spec 1.4."""

    def affine(inputs, outputs):
        return inputs * outputs + outputs

    size = state_size
    z = size * (flags["use_new_state"] + flags["use_old_state"] + flags["use_residual"])
    per_layer = affine(2 * size, size) + affine(z, size)
    per_layer += flags["use_input_gate"] * 2 * affine(2 * size, size)
    per_layer += flags["use_state_gate"] * affine(3 * size, size)
    per_layer += flags["use_forget_gate"] * affine(3 * size, size)
    per_layer += flags["use_output_gate"] * affine(size + z, size)
    return n_layers * per_layer + affine(256, size) + affine(size, 256)


def finite_difference(params, flags, n_layers, batch, name, direction, width=1e-3):
    """The slope of the loss when params[name] moves along `direction`, from four losses and no gradient.

    batch      (states, bytes_in, bytes_out)
    direction  an array of the shape of params[name]

    The five-point formula: its error is of order width⁴, so that the width can stay far above the rounding.
    """

    def loss_at(distance):
        moved = mapped(lambda p, d: p + distance * d, params[name], direction)
        return loss_only({**params, name: moved}, flags, n_layers, *batch)

    near = loss_at(width) - loss_at(-width)
    far = loss_at(2 * width) - loss_at(-2 * width)
    return (8 * near - far) / (12 * width)


def flat(array):
    """The elements of a vector or a matrix, row by row."""
    return [v for row in array for v in row] if isinstance(array[0], list) else list(array)


def unit(array, place):
    """An array of the same shape with a one at `place` of its `flat` form, and zeros elsewhere."""
    places = iter(range(len(flat(array))))
    return mapped(lambda _: float(next(places) == place), array)


def some_batch(n_layers, state_size, size, rng):
    """States away from zero and bytes, for the checks: (states, bytes_in, bytes_out)."""
    states = [[[rng.uniform(-1, 1) for _ in range(state_size)] for _ in range(n_layers)] for _ in range(size)]
    return states, rng.sample(range(VOCABULARY), size), rng.sample(range(VOCABULARY), size)


def places_to_try(name, array, batch, rng):
    """Every element, but of the two arrays with a side of 256 only some: those that the bytes touch, and others."""
    inputs = len(array[0]) if isinstance(array[0], list) else 1
    _, bytes_in, bytes_out = batch
    if name == "embed.weight":
        return [row * inputs + byte for row in range(len(array)) for byte in {*bytes_in, rng.randrange(VOCABULARY)}]
    if name.startswith("head."):
        rows = {*bytes_out, rng.randrange(VOCABULARY), rng.randrange(VOCABULARY)}
        return [row * inputs + column for row in rows for column in range(inputs)]
    return range(len(flat(array)))


def worst_element_error(flags, n_layers, state_size, seed):
    """Each gradient element against its finite difference: the largest error, relative to its array's largest."""
    rng = random.Random(seed)
    params, batch = draw(flags, n_layers, state_size, seed, bound=1.0), some_batch(n_layers, state_size, 2, rng)
    _, grads, _ = loss_and_gradients(params, flags, n_layers, *batch)
    worst = 0.0
    for name, array in params.items():
        grad = flat(grads[name] or mapped(lambda _: 0.0, array))
        for place in places_to_try(name, array, batch, rng):
            slope = finite_difference(params, flags, n_layers, batch, name, unit(array, place))
            worst = max(worst, abs(slope - grad[place]) / (max(map(abs, grad)) or 1.0))
    return worst


def worst_direction_error(flags, n_layers, state_size, seed):
    """Each gradient array along one random direction: the largest error, relative to |gradient|·|direction|.

    Where the gradient is absent, the loss must not move by a single bit.
    """
    rng = random.Random(seed)
    params, batch = draw(flags, n_layers, state_size, seed, bound=1.0), some_batch(n_layers, state_size, 2, rng)
    _, grads, _ = loss_and_gradients(params, flags, n_layers, *batch)
    worst = 0.0
    for name, array in params.items():
        direction = mapped(lambda _: rng.uniform(-1, 1), array)
        slope = finite_difference(params, flags, n_layers, batch, name, direction)
        if grads[name] is None:
            check(slope == 0.0, f"{as_code(flags)}: {name} has no gradient, yet the loss moves with it")
            continue
        grad, along = flat(grads[name]), flat(direction)
        worst = max(worst, abs(slope - dot(grad, along)) / (math.hypot(*grad) * math.hypot(*along)))
    return worst


def check(holds, otherwise):
    if not holds:
        raise SystemExit(f"the oracle is wrong: {otherwise}")


def check_counts():
    """Parameter counts: the arrays, the formula, and the numbers that the spec gives."""
    for flags in every_flags():
        for n_layers in (1, 2, 3):
            counted = sum(len(flat(array)) for array in draw(flags, n_layers, 3, seed=0).values())
            check(counted == parameter_count(flags, n_layers, 3), f"{as_code(flags)} L{n_layers}: count of arrays")
            for size in (3, 32, 256, 512):
                formula = count_by_the_spec(flags, n_layers, size)
                check(formula == parameter_count(flags, n_layers, size), f"{as_code(flags)} L{n_layers} S{size}")
    check(parameter_count(from_code(".F.SN.R"), 2, 256) == 1_444_352, "spec 1.4, first check value")
    check(parameter_count(from_code("IFOSN.R"), 2, 512) == 9_182_976, "spec 1.4, second check value")
    stage_1 = [parameter_count(flags, n_layers, 256) for flags in every_flags() for n_layers in (1, 2, 3)]
    bypass = [flags for flags in every_flags() if flags["use_residual"]]
    stage_1 += [parameter_count(flags, n_layers, 32) for flags in bypass for n_layers in (1, 2, 3)]
    check(len(stage_1) == 432, "spec 1.6, 432 configurations")
    check((min(stage_1), max(stage_1)) == (20_832, 3_872_512), "spec 1.4, range of stage 1")
    return "96 flag combinations x 3 depths x 4 sizes, and the spec's four numbers"


def check_by_hand():
    """With every flag on and S = 1, spec 1.2 written out once more in plain arithmetic."""
    p, h = draw(from_code("IFOSNLR"), 1, 1, seed=5, bound=1.0), 0.7

    def lin(name, *inputs):
        return dot(p[f"layers.0.{name}.weight"][0], inputs) + p[f"layers.0.{name}.bias"][0]

    x = p["embed.weight"][0][65] + p["embed.bias"][0]
    u, r = logistic(lin("input_gate", x, h)), logistic(lin("state_input_gate", x, h))
    n = math.tanh(lin("state", u * x, r * h))
    g = logistic(lin("state_gate", u * x, r * h, n))
    n = g * n + (1 - g) * h
    n = logistic(lin("forget_gate", u * x, r * h, n)) * n
    o = lin("out", n, r * h, x)
    y = o * logistic(lin("output_gate", o, n, r * h, x))
    expected = [row[0] * y + b for row, b in zip(p["head.weight"], p["head.bias"], strict=True)]
    logits, state, _ = forward(p, from_code("IFOSNLR"), 1, [[h]], 65)
    error = max(abs(a - b) for a, b in zip([*logits, *state[0]], [*expected, n], strict=True))
    check(error < 1e-14, f"the layer by hand differs by {error}")
    return f"S = 1 with every flag: largest difference {error:.1e}"


def check_limits():
    """What a gate does when a large bias holds it open or shut."""
    h = [[0.3, -0.8, 0.5]]
    flags, raw = from_code("I..SN.."), draw(from_code("I..SN.."), 1, 3, seed=1)
    shut = {**raw, "layers.0.state_gate.bias": [-800.0] * 3}
    check(forward(shut, flags, 1, h, 65)[1] == h, "a shut state gate must keep the raw old state")
    flags, raw = from_code(".F.SN.."), draw(from_code(".F.SN.."), 1, 3, seed=1)
    shut = {**raw, "layers.0.forget_gate.bias": [-800.0] * 3}
    check(forward(shut, flags, 1, h, 65)[1] == [[0.0] * 3], "a shut forget gate must empty the new state")
    return "shut state gate keeps the raw h, shut forget gate gives zeros"


def check_delay():
    """Spec 1.5: reading only the old state, ungated, a net of L layers predicts byte t+1 from the bytes <= t-L."""
    for code in (".F.S.L.", "..O..L."):
        for n_layers in (1, 2, 3):
            params = draw(from_code(code), n_layers, 3, seed=2, bound=1.0)
            outputs = []
            for first in (65, 66):
                state, seen = zero_state(n_layers, 3), []
                for byte in (first, 1, 2, 3, 4):
                    logits, state, _ = forward(params, from_code(code), n_layers, state, byte)
                    seen.append(logits)
                outputs.append(seen)
            differs = [a != b for a, b in zip(*outputs, strict=True)]
            check(differs.index(True) == n_layers, f"{code} L{n_layers}: the first byte shows in {differs}")
    return "a byte shows L steps later, L = 1, 2, 3"


def check_absent():
    """Absent gradients are those of spec 1.5, from zero states as well as from others."""
    rng, counts = random.Random(4), []
    for flags in every_flags():
        for n_layers in (1, 2, 3):
            params, batch = draw(flags, n_layers, 3, seed=4), some_batch(n_layers, 3, 2, rng)
            expected = absent_by_the_spec(flags, n_layers, params)
            for states in (batch[0], [zero_state(n_layers, 3)] * 2):
                _, grads, _ = loss_and_gradients(params, flags, n_layers, states, *batch[1:])
                absent = {name for name, grad in grads.items() if grad is None}
                check(absent == expected, f"{as_code(flags)} L{n_layers}: absent {sorted(absent ^ expected)}")
                check(set(grads) == set(params), "grads must name every parameter")
            counts.append(len(expected))
    return f"{len(counts)} settings, {sum(map(bool, counts))} with absent gradients, at most {max(counts)} arrays"


def check_elements():
    """Single elements, three layers, for a few flag combinations."""
    codes = ("IFOSNLR", ".....L.", "....N..", ".F.SN.R", "I.O..L.", "IF.S.LR", "..OSNL.", ".FO..LR")
    lines = []
    for seed, code in enumerate(codes):
        error = worst_element_error(from_code(code), 3, 3, seed)
        check(error < 1e-6, f"{code}: gradient off by {error}")
        lines.append(f"{code} {error:.1e}")
    return ", ".join(lines)


def check_directions():
    """Whole arrays along a random direction, three layers, for all flag combinations."""
    worst = max(worst_direction_error(flags, 3, 3, seed) for seed, flags in enumerate(every_flags()))
    check(worst < 1e-6, f"gradient along a direction off by {worst}")
    return f"every array of 96 flag combinations, largest relative error {worst:.1e}"


def check_adam():
    """The first step is lr·sign(gradient), a second one is worked by hand, and None is skipped."""
    params = {"a": [1.0, 2.0], "b": [[3.0]], "c": [4.0]}
    once, moments = adam_step(params, {"a": [0.5, -0.25], "b": [[0.0]], "c": None}, {}, 1)
    error = max(abs(once["a"][0] - 0.999), abs(once["a"][1] - 2.001))
    check(error < 1e-9, f"the first step of Adam is off by {error}")
    check(once["b"] == [[3.0]] and once["c"] == [4.0] and set(moments) == {"a", "b"}, "zero and absent gradients")
    check(params == {"a": [1.0, 2.0], "b": [[3.0]], "c": [4.0]}, "the parameters given must stay as they were")
    twice, _ = adam_step(once, {"a": [0.1, 0.0], "b": [[0.0]], "c": None}, moments, 2)
    m, v = (0.9 * 0.05 + 0.1 * 0.1) / (1 - 0.81), (0.999 * 0.00025 + 0.001 * 0.01) / (1 - 0.998001)
    error = abs(twice["a"][0] - (once["a"][0] - 0.001 * m / (math.sqrt(v) + 1e-8)))
    check(error < 1e-14, f"the second step of Adam is off by {error}")
    return "two steps by hand; zero and absent gradients"


def check_speed():
    """How long one training step takes where it is slowest."""
    flags, rng = from_code("IFOSNLR"), random.Random(0)
    params, batch = draw(flags, 3, 4, seed=0), some_batch(3, 4, 3, rng)
    start = time.perf_counter()
    for _ in range(10):
        loss, grads, _ = loss_and_gradients(params, flags, 3, *batch)
    middle = time.perf_counter()
    for _ in range(10):
        adam_step(params, grads, {}, 1)
    gradient_ms, adam_ms = (middle - start) * 100, (time.perf_counter() - middle) * 100
    check(math.isfinite(loss), "the loss must be finite")
    return f"S = 4, B = 3, L = 3, every flag: loss_and_gradients {gradient_ms:.1f} ms, adam_step {adam_ms:.1f} ms"


if __name__ == "__main__":
    for test in (
        check_counts,
        check_by_hand,
        check_limits,
        check_delay,
        check_absent,
        check_elements,
        check_directions,
        check_adam,
        check_speed,
    ):
        print(f"{test.__name__.removeprefix('check_'):<11} {test()}", flush=True)
