"""This library's side of `networks.py`: its models with given weights, compiled steps, and their rows of figures."""

import itertools

import breakdown
import inputs
import jax
import jax.numpy as jnp
import measure
import numpy as np
import optax
from flax import nnx
from jax import lax
from workloads import IN_FEATURES, LEARNING_RATE, LOSS_SCALE, error, error_limit, first_scan, wall_figures

import jaxsparse as js
from jaxsparse.models import blocks


def layers_in_order(module):
    """Convolutions and norms of a network, or of a part, in running order: a block's shortcut after its second norm."""
    match module:
        case js.models.SparseResUNet42():
            encoder = zip(module.down, module.encoder, strict=True)
            decoder = zip(module.up, module.decoder, strict=True)
            parts = [module.stem, *itertools.chain(*encoder), *itertools.chain(*decoder)]
        case js.models.SparseResNet21D():
            parts = module.stages
        case nnx.Sequential():
            parts = module.layers
        case blocks.ConvBlock():
            parts = [module.conv, module.norm]
        case blocks.ResidualBlock():
            parts = [module.conv1, module.norm1, module.conv2, module.norm2]
            parts += [] if module.shortcut is None else [module.shortcut]
        case _:
            return [module]
    return [layer for part in parts for layer in layers_in_order(part)]


def model_of(workload, weights, dtype, param_dtype):
    """The network with the given weights, computing in `dtype`, with its parameters stored in `param_dtype`."""
    model = workload.network.model(IN_FEATURES, width=workload.width, dtype=dtype, rngs=nnx.Rngs(0))
    for layer, values in zip(layers_in_order(model), weights, strict=True):
        if isinstance(values, tuple):
            for variable, value in zip((layer.scale, layer.bias, layer.mean, layer.var), values, strict=True):
                variable[...] = jnp.asarray(value)
        else:
            layer.kernel[...] = jnp.asarray(values)
    nnx.update(model, jax.tree.map(lambda a: a.astype(param_dtype), nnx.state(model, nnx.Param)))
    return model


def last_output(model, x):
    """The output of the last stage."""
    y = model(x)
    return y[-1] if isinstance(y, list) else y


def one_array(tree):
    """All leaves in one array, and the function that cuts it up again; then vectors are float32.

    XLA passes custom calls the place in the array of leaves that fill multiples of 256 bytes, which come first. The
    others, the vectors of norms, it would copy with a kernel each: those of 16 bits are widened in one loop for all of
    a length, since barriers keep their conversions and slices together. It fuses up to about 90 operands, so longer
    concatenations, and what is computed on the way into them, would be a kernel each as well.
    """
    leaves, structure = jax.tree.flatten(tree)
    dtype = leaves[0].dtype
    is_whole = np.array([a.ndim > 1 and a.nbytes % 256 == 0 for a in leaves])
    order = np.argsort(~is_whole, kind="stable")
    place, whole = np.argsort(order), int(is_whole.sum())
    start = sum(leaves[i].size for i in order[:whole])
    cuts = np.cumsum([leaves[i].size for i in order])[:-1]

    def leaves_of(array):
        pieces = jnp.split(array, cuts)
        if dtype != jnp.float32:
            vectors = jnp.split(lax.optimization_barrier(array[start:]), cuts[whole:] - start)
            pieces[whole:] = lax.optimization_barrier([v.astype(jnp.float32) for v in vectors])
        return structure.unflatten([pieces[i].reshape(a.shape) for i, a in zip(place, leaves, strict=True)])

    flat = [leaves[i].ravel() for i in order]
    vectors = [flat[i : i + 64] for i in range(whole, len(flat), 64)]
    return jnp.concatenate(flat[:whole] + [lax.optimization_barrier(jnp.concatenate(v)) for v in vectors]), leaves_of


def tensors(ring, model, dtype, factor):
    """Resident tensors of one shape, with `factor` times the rows of the largest, and capacities planned for all."""
    capacity = inputs.capacity_for(max(len(v.coords) for v in ring), factor)
    plan = js.capacities(model, [inputs.tensor(v, dtype, capacity) for v in ring], slack=factor)
    return [inputs.tensor(v, dtype, capacity, plan) for v in ring]


class Inference:
    """The output of one batch; the model's arrays are constants of the program, so there is no state."""

    task, donates, is_training, state = "inference", False, False, ()

    def __init__(self, workload, weights, dtype):
        self.model = model_of(workload, weights, dtype, dtype)
        self.model.eval()
        self.constant_bytes = sum(a.nbytes for a in jax.tree.leaves(nnx.state(self.model)))

    def run(self, state, x):
        """No state, the features, and the status."""
        y = last_output(self.model, x)
        return None, y.feats, y.status

    def checked(self, feats, x):
        """What the reference gives too."""
        sites = jax.jit(lambda x: last_output(self.model, x).sites)(x)
        coords = inputs.real(sites)
        return first_scan(coords, np.asarray(feats, np.float64)[: len(coords)])


class Gradients:
    """The loss and its gradients for all weights, which are stored in the compute dtype.

    Weights, statistics and gradients cross as one array each: each one that crosses costs the host some microseconds.
    """

    task, donates, is_training, constant_bytes = "forward + backward", False, True, 0
    recomputes = False

    def __init__(self, workload, weights, dtype, param_dtype=None):
        self.model = model_of(workload, weights, dtype, param_dtype or dtype)
        self.model.train()
        self.graph, params, statistics = nnx.split(self.model, nnx.Param, nnx.BatchStat)
        params, self.params_of = one_array(params)
        statistics, self.statistics_of = one_array(statistics)
        self.scale, self.state = LOSS_SCALE[dtype], (params, statistics)

    def merged(self, params, statistics):
        """The network with these arrays; its norms update their own copy of the statistics."""
        return nnx.merge(self.graph, self.params_of(params), self.statistics_of(statistics), copy=True)

    def gradients(self, params, statistics, x):
        """((scaled loss, (status, statistics)), scaled gradients)."""

        def loss(params):
            model = self.merged(params, statistics)
            y = last_output(model, x)
            mean = jnp.sum(jnp.square(y.feats.astype(jnp.float32))) / (y.count * y.feats.shape[1])
            return self.scale * mean, (y.status, one_array(nnx.state(model, nnx.BatchStat))[0])

        if self.recomputes:
            loss = jax.checkpoint(loss, policy=js.ops.save_products)
        return jax.value_and_grad(loss, has_aux=True)(params)

    def run(self, state, x):
        """No new state, loss, gradients and statistics, and the status."""
        (loss, (status, statistics)), grads = self.gradients(*state, x)
        return None, (loss, grads, statistics), status

    def checked(self, result, x):
        """Gradients as `reference.gradients` gives them."""
        found = []
        for layer in layers_in_order(self.merged(result[1], self.state[1])):
            names = ("scale", "bias") if isinstance(layer, js.nn.BatchNorm) else ("kernel",)
            values = [np.asarray(getattr(layer, name)[...], np.float64) / self.scale for name in names]
            found.append(tuple(values) if len(values) > 1 else values[0])
        return found


class LeanGradients(Gradients):
    """The same; norms and activations are computed again in the backward pass, not kept for it."""

    task, recomputes = "forward + backward, recomputing", True


class TrainStep(Gradients):
    """A whole step as users take it: float32 parameters, AdamW, running statistics; the state is given away.

    It has no check of its own: its gradients are those of the row before, from parameters that are not rounded.
    """

    task, donates = "train step", True

    def __init__(self, workload, weights, dtype):
        super().__init__(workload, weights, dtype, "float32")
        self.optimizer = optax.adamw(LEARNING_RATE)
        self.state = (*self.state, self.optimizer.init(self.state[0]))

    def run(self, state, x):
        """The new state, loss and gradients' norm, and the status."""
        params, statistics, optimizer = state
        (loss, (status, statistics)), grads = self.gradients(params, statistics, x)
        updates, optimizer = self.optimizer.update(grads / self.scale, optimizer, params)
        return (optax.apply_updates(params, updates), statistics, optimizer), loss, status


def rows(workload, weights, ring, args, factor, expected):
    """The rows of one workload: a row for each task."""
    found = []
    for task in (Gradients, LeanGradients, TrainStep) if workload.training else (Inference,):
        program = task(workload, weights, args.dtype)
        batches = tensors(ring, program.model, args.dtype, factor)
        found.append(row_of(program, batches, args, expected))
    return found


def row_of(program, batches, args, expected):
    """Compiles, checks and times one task."""
    state = program.state
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), state)

    def lower():
        def step(state, x):
            return program.run(state, x)

        donated, options = (0,) if program.donates else (), js.COMPILER_OPTIONS if args.concurrent else None
        return jax.jit(step, donate_argnums=donated, compiler_options=options).lower(shapes, batches[0])

    compiled, *seconds = measure.compile_seconds(lower)
    memory = measure.memory_mb(compiled)
    row = {"task": program.task, "compile_s": seconds, "memory_mb": memory and memory + program.constant_bytes / 1e6}
    if not program.donates:
        _, result, status = compiled(state, batches[0])
        js.status.check(status)
        row["error"] = error(program.checked(result, batches[0]), expected)
        if row["error"] > error_limit(args.dtype, program.is_training):
            return row

    def stepper(compiled):
        def step(x):
            nonlocal state
            new, *rest = compiled(state, x)
            state = state if new is None else new
            return rest

        return step

    step = stepper(compiled)
    with measure.count_compilations() as compilations:
        row |= wall_figures(step, batches, jax.block_until_ready, args.steps, args.calls)
        row["compiled"] = 1 + len(compilations)
    if jax.default_backend() == "gpu":
        steps = min(args.steps, len(batches))
        row |= measure.kernel_figures(measure.gpu_kernels(lambda: measure.run_steps(step, batches, steps)), steps)
        if args.breakdown:
            row["breakdown_ms"] = breakdown.of_step(lower(), stepper, batches)
    js.status.check(step(batches[0])[-1])
    return row
