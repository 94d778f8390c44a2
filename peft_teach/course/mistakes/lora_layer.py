"""Typical wrong answers to chapter 03, each the smallest edit of the reference that makes it."""

from peft_teach.course.mistakes import Mistake

# ---------------------------------------------------------------- delta_weight

_SCALING = "    scaling = lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r\n    return (B @ A) * scaling"


def _delta(new: str, cause: str) -> Mistake:
    return Mistake("lora_layer.delta_weight", (_SCALING, new), cause)


_DELTA = (
    _delta("    return B @ A", "the product is not scaled by α/r"),
    _delta("    scaling = math.sqrt(r) / lora_alpha if use_rslora else r / lora_alpha\n    return (B @ A) * scaling",
           "the scaling is turned over: r/α"),
    _delta("    return (B @ A) * lora_alpha", "the product is scaled by α, without dividing by r"),
    _delta("    return (B @ A) / (math.sqrt(r) if use_rslora else r)", "α is left out and only 1/r is applied"),
    _delta("    return (B @ A) * lora_alpha / r", "use_rslora is ignored"),
    _delta("    return (B @ A) * lora_alpha / math.sqrt(r)", "α/√r is used with and without use_rslora"),
    _delta("    return (B @ A) * (lora_alpha / r**2 if use_rslora else lora_alpha / r)", "rsLoRA divides by r² instead of √r"),
    _delta("    return (B @ A) * (lora_alpha / r) ** (0.5 if use_rslora else 1)", "rsLoRA takes the root of α/r instead of that of r alone"),
    _delta(_SCALING.replace("lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r", "lora_alpha / r if use_rslora else lora_alpha / math.sqrt(r)"),
           "α/√r and α/r are exchanged: use_rslora is read the wrong way round"),
    _delta(_SCALING.replace("(B @ A)", "(B @ A).T"), "the result is transposed: (in, out) instead of (out, in)"),
    _delta(_SCALING.replace("(B @ A)", "(A @ B)"), "A and B are multiplied the wrong way round"),
    _delta(_SCALING.replace("(B @ A)", "(B @ A).detach()"), "the product is detached, so that nothing can be trained through it"),
    _delta(_SCALING.replace("(B @ A)", "(B.float() @ A.float())"), "the factors are cast to float32, whatever dtype they have"),
    _delta(_SCALING + "**2", "the scaling is applied squared, as when A and B are both scaled by it"),
)

# ---------------------------------------------------------------- init_lora_

_INIT = "    nn.init.kaiming_uniform_(A, a=math.sqrt(5))  # with this a, the bound is 1/√in_features\n    nn.init.zeros_(B)"


def _init(key: str, new: str, cause: str, **told: str) -> Mistake:
    return Mistake(key, (_INIT, new), cause, **told)


_START = (
    ("    nn.init.zeros_(A)\n    nn.init.kaiming_uniform_(B, a=math.sqrt(5))", "A and B are started the wrong way round: A zero, B drawn"),
    ("    nn.init.zeros_(A)\n    nn.init.zeros_(B)", "A and B both start at zero, where neither has a gradient"),
    ("    nn.init.kaiming_uniform_(A, a=math.sqrt(5))\n    nn.init.kaiming_uniform_(B, a=math.sqrt(5))", "B is drawn too, so that the new layer is not the old one"),
    ("    nn.init.normal_(A, std=0.01)\n    nn.init.zeros_(B)", "A starts as 0.01 · N(0, 1), whatever in_features is"),
    ("    nn.init.normal_(A, std=1 / A.shape[0])\n    nn.init.zeros_(B)", "A starts as N(0, 1/r²), which is peft's option \"gaussian\" and not its default"),
    ("    nn.init.normal_(A, std=1 / math.sqrt(A.shape[1]))\n    nn.init.zeros_(B)", "A is drawn from a normal distribution with deviation 1/√in instead of a uniform one"),
    ("    nn.init.kaiming_uniform_(A)\n    nn.init.zeros_(B)", "kaiming_uniform_ is called without a = √5: the bound is √6/√in instead of 1/√in"),
    ("    nn.init.uniform_(A, -1 / math.sqrt(A.shape[0]), 1 / math.sqrt(A.shape[0]))\n    nn.init.zeros_(B)", "the bound of A is 1/√r instead of 1/√in"),
    ("    nn.init.uniform_(A, 0, 1 / math.sqrt(A.shape[1]))\n    nn.init.zeros_(B)", "A is drawn from 0 to 1/√in: only positive numbers"),
    ("    nn.init.xavier_uniform_(A)\n    nn.init.zeros_(B)", "A is started by xavier_uniform_, whose bound is √(6/(in + r))"),
    ("    nn.init.kaiming_normal_(A)\n    nn.init.zeros_(B)", "A is started by kaiming_normal_ instead of kaiming_uniform_"),
    ("    nn.init.ones_(A)\n    nn.init.zeros_(B)", "A starts as ones: its r rows stay the same for ever"),
    ("    nn.init.uniform_(A, -1, 1)\n    nn.init.zeros_(B)", "A is drawn between −1 and 1, whatever in_features is"),
    ("    nn.init.orthogonal_(A)\n    nn.init.zeros_(B)", "A starts with orthonormal rows"),
)

_INIT_MISTAKES = tuple(_init("lora_layer.init_lora_", new, cause) for new, cause in _START) + (
    _init("lora_layer.init_lora_", _INIT.split("\n")[0], "B is left as it was"),
    _init("lora_layer.init_lora_", "    nn.init.zeros_(B)", "A is left as it was"),
    _init("lora_layer.init_lora_", "    bound = 1 / math.sqrt(A.shape[1])\n    A.uniform_(-bound, bound)\n    B.zero_()", "a parameter is changed in place without torch.no_grad()"),
    _init("lora_layer.init_lora_", "    torch.manual_seed(0)\n" + _INIT, "the random state is set in here, so that every layer gets the same A"),
    _init("lora_layer.init_lora_", "    A = nn.init.kaiming_uniform_(A.detach().clone(), a=math.sqrt(5))\n    B = torch.zeros_like(B)",
          "new tensors are made and the ones that were given stay as they were"),
)

# ---------------------------------------------------------------- add_update

_UPDATE = "    update = F.linear(F.linear(x.to(A.dtype), A), B) * scaling\n    return (y + update).to(y.dtype)"


def _add(new: str, cause: str, **told: str) -> Mistake:
    return Mistake("lora_layer.add_update", (_UPDATE, new), cause, **told)


_ADD = (
    _add(_UPDATE.replace(" * scaling", ""), "the update is not scaled"),
    _add(_UPDATE.replace(" * scaling", " / scaling"), "the update is divided by the scaling"),
    _add(_UPDATE.replace("(y + update)", "update"), "only the update comes back: y is not added"),
    _add(_UPDATE.replace("y + update", "y - update"), "the update is subtracted"),
    _add("    update = F.linear(F.linear(x.to(A.dtype), A), B)\n    return ((y + update) * scaling).to(y.dtype)", "y is scaled too"),
    _add("    update = F.linear(F.linear(x.to(A.dtype), A), B) * scaling\n    return y + update.to(y.dtype)",
         "the update is cast before it is added: two roundings instead of one",
         why="casting to the dtype that is wanted, as early as possible", breaks="up to one unit in the last place of y, in a share of all outputs",
         shows="bfloat16: 256 + 1.002 comes out as 256 instead of 258"),
    _add("    update = F.linear(F.linear(x.to(A.dtype), A), B) * scaling\n    return y + update.to(x.dtype)",
         "the update is cast to x's dtype before it is added"),
    _add(_UPDATE.replace("(y + update)", "(y.detach() + update)"), "y is detached: the frozen path passes no gradient on"),
    _add("    y += F.linear(F.linear(x.to(A.dtype), A), B) * scaling\n    return y", "the caller's y is overwritten"),
    _add("    update = F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype)) * scaling\n    return y + update",
         "A and B are cast down to x's dtype, so that the update itself is computed in 16 bits"),
    _add(_UPDATE.replace(".to(y.dtype)", ""), "the result is not cast back: it leaves in float32"),
    _add(_UPDATE.replace("x.to(A.dtype)", "x"), "x is not brought to the dtype of A"),
    _add(_UPDATE.replace("x.to(A.dtype), A", "x.to(A.dtype), A.detach()"), "A is detached and gets no gradient"),
    _add(_UPDATE.replace("* scaling", "* scaling**2"), "the scaling is applied twice"),
    _add(_UPDATE.replace("x.to(A.dtype)", "x.detach().to(A.dtype)"), "x is detached: layers below get no gradient through the adapter"),
)

# ---------------------------------------------------------------- LoRALayer and LoRALinear

_LINEAR = "lora_layer.LoRALinear"
_SELF_SCALING = "        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)\n        self.dropout = nn.Dropout(lora_dropout)\n"
_IN_LAYER = _SELF_SCALING + "        self.lora_A = nn.Parameter(torch.empty(r, in_features))"
_IN_LINEAR = _SELF_SCALING + "        # 16 bits"
_FORWARD = "        return add_update(y, self.dropout(x.to(self.lora_A.dtype)), self.lora_A, self.lora_B, self.scaling)"
_LAYER_FORWARD = "        return add_update(nothing, self.dropout(x), self.lora_A, self.lora_B, self.scaling)"

_SCALES = (
    ("lora_alpha / (math.sqrt(r) if use_rslora else r)", "1.0", "forward does not scale the update by α/r"),
    ("lora_alpha / (math.sqrt(r) if use_rslora else r)", "(math.sqrt(r) if use_rslora else r) / lora_alpha", "forward's scaling is turned over: r/α"),
    ("lora_alpha / (math.sqrt(r) if use_rslora else r)", "lora_alpha", "forward scales by α, without dividing by r"),
    ("lora_alpha / (math.sqrt(r) if use_rslora else r)", "1 / (math.sqrt(r) if use_rslora else r)", "α is left out and only 1/r is applied in forward"),
    ("lora_alpha / (math.sqrt(r) if use_rslora else r)", "lora_alpha / r", "use_rslora is ignored in forward"),
    ("lora_alpha / (math.sqrt(r) if use_rslora else r)", "lora_alpha / math.sqrt(r)", "α/√r is used in forward with and without use_rslora"),
    ("lora_alpha / (math.sqrt(r) if use_rslora else r)", "lora_alpha / (r**2 if use_rslora else r)", "rsLoRA divides by r² instead of √r"),
)

_DROPS = (  # (x as it goes in, what is called instead, cause)
    ("F.linear(self.dropout(F.linear({x}, self.lora_A)), self.lora_B) * self.scaling", "dropout stands behind A instead of before it"),
    ("self.dropout(F.linear(F.linear({x}, self.lora_A), self.lora_B)) * self.scaling", "dropout falls on the update instead of on the input of A"),
    ("F.linear(F.linear(F.dropout({x}, self.dropout.p), self.lora_A), self.lora_B) * self.scaling", "dropout stays active in eval mode"),
    ("F.linear(F.linear({x}, self.lora_A), self.lora_B) * self.scaling", "lora_dropout is ignored"),
    ("F.linear(F.linear(self.dropout({x}) * (1 - self.dropout.p if self.training else 1), self.lora_A), self.lora_B) * self.scaling",
     "what dropout keeps is not divided by 1 − p"),
    ("F.linear(F.linear({x} * self.dropout(torch.ones({x}.shape[-1])), self.lora_A), self.lora_B) * self.scaling",
     "one dropout mask is drawn and used for every token"),
    ("F.linear(F.linear({x} * self.dropout(torch.ones({x}.shape[0], 1, {x}.shape[-1])), self.lora_A), self.lora_B) * self.scaling",
     "one dropout mask is drawn for a sentence and used for all its tokens"),
    ("F.linear(F.linear(F.dropout({x}, 1 - self.dropout.p, self.training and self.dropout.p > 0), self.lora_A), self.lora_B) * self.scaling",
     "lora_dropout is taken as the share that is kept"),
)

_GRADS = (
    ("F.linear(F.linear(self.dropout({x}), self.lora_A.detach()), self.lora_B) * self.scaling", "A is detached in forward and is never trained"),
    ("F.linear(F.linear(self.dropout({x}).detach(), self.lora_A), self.lora_B) * self.scaling", "the update's input is detached: layers below get no gradient through it"),
    ("F.linear(F.linear(self.dropout({x}), self.lora_A), self.lora_B) * self.scaling * 2", "the update is added twice"),
    ("-F.linear(F.linear(self.dropout({x}), self.lora_A), self.lora_B) * self.scaling", "the update is subtracted"),
    ("F.linear(torch.relu(F.linear(self.dropout({x}), self.lora_A)), self.lora_B) * self.scaling", "there is a nonlinearity between A and B, as in an adapter layer"),
)


def _both(key: str) -> tuple[Mistake, ...]:
    """The mistakes that can be made in either class."""
    layer = key.endswith("LoRALayer")
    start, forward = (_IN_LAYER, _LAYER_FORWARD) if layer else (_IN_LINEAR, _FORWARD)
    x, prefix = ("x", "        return ") if layer else ("x.to(self.lora_A.dtype)", "        return y + ")
    found = [Mistake(key, (start, start.replace(old, new)), cause) for old, new, cause in _SCALES]
    found += [_init(key, new, cause) for new, cause in _START]
    found += [Mistake(key, (forward, prefix + new.format(x=x)), cause) for new, cause in _DROPS + _GRADS]
    return tuple(found)


_A_LINEAR = "self.lora_A = nn.Parameter(torch.empty(r, in_features, dtype=dtype, device=base.device))"
_B_LINEAR = "self.lora_B = nn.Parameter(torch.empty(out_features, r, dtype=dtype, device=base.device))"
_INIT_LINEAR = "        init_lora_(self.lora_A, self.lora_B)\n        # The weight as it was"
_FREEZE = "self.linear = linear.requires_grad_(False)"
_IF_MERGED = "        if self.merged:\n            return y\n"
_MERGE_GUARD = "        if self.merged:\n            return\n        weight = self.linear.weight"
_UNMERGE_GUARD = "        if not self.merged:\n            return\n        self.linear.weight.copy_"
_ADD_DELTA = "weight += delta if isinstance(self.linear, nn.Linear) else delta.T  # Conv1D keeps (in, out)"
_KEEP = "self.weight_before_merge = weight.detach().clone()"
_RESTORE = "        self.linear.weight.copy_(self.weight_before_merge)\n        self.weight_before_merge = None"
_DELTA_DOC = '        """scaling · B A: what merging adds to the weight."""\n        return '
_DELTA_LINEAR = _DELTA_DOC + "delta_weight(self.lora_A, self.lora_B, self.lora_alpha, self.r, self.use_rslora)"
_Y = "        y = self.linear(x)\n        if self.merged:"


_NOT_RESTORED = "unmerge leaves the weight merged: nothing is restored, or the copy was no copy and changed along with it"


def _linear(old: str, new: str, cause: str, **told: str) -> Mistake:
    return Mistake(_LINEAR, (old, new), cause, **told)


_LINEAR_ONLY = (
    _linear(_FREEZE, "self.linear = linear", "the wrapped layer is not frozen",
            why="wrapping feels like replacing", breaks="all weights of the layer are trained, and their optimizer states kept: nothing is saved",
            shows="the count of trainable numbers"),
    _linear(_FREEZE, "self.linear = linear\n        linear.weight.requires_grad_(False)", "the weight is frozen, but its bias is trained",
            why="the formula has only W in it", breaks="the bias drifts; an adapter saved alone is not what was trained",
            shows="the count of trainable numbers, off by out_features"),
    _linear(_IF_MERGED, "", "forward adds the update after merging too",
            why="forward is written before merge", breaks="the update counts twice as soon as a model is merged for serving",
            shows="the output before and after merge()"),
    _linear(_MERGE_GUARD, "        weight = self.linear.weight", "a second merge() adds the update again",
            why="one call is what one tests", breaks="the base, for good, when two parts of a program both merge",
            shows="linear.weight after two calls"),
    _linear(_ADD_DELTA, "delta = self.lora_B @ self.lora_A\n        weight += delta if isinstance(self.linear, nn.Linear) else delta.T",
            "merge adds B A without the scaling", why="the scaling stands in forward",
            breaks="the merged model is another model", shows="the output before and after merge()"),
    _linear(_ADD_DELTA, _ADD_DELTA.replace("+=", "-="), "merge subtracts the update"),
    _linear(_ADD_DELTA, _ADD_DELTA.replace("weight +=", "weight += 2 *").replace("* delta", "* (delta").replace(" else delta.T", " else delta.T)"),
            "merge adds the update twice"),
    _linear(_ADD_DELTA, "weight += delta", "merge forgets that a Conv1D keeps its weight transposed, (in, out)"),
    _linear(_ADD_DELTA, "weight.copy_(delta if isinstance(self.linear, nn.Linear) else delta.T)", "merge replaces the weight by the update instead of adding to it"),
    _linear(_ADD_DELTA, "pass", "merge only sets its flag: the weight stays"),
    _linear(_KEEP, "self.weight_before_merge = weight.detach()", _NOT_RESTORED,
            why="`.detach()` looks like a copy", breaks="unmerge, in silence", shows="linear.weight after merge() and unmerge()"),
    _linear(_RESTORE, "        self.weight_before_merge = None", _NOT_RESTORED),
    _linear(_RESTORE, "        self.linear.weight.copy_(self.weight_before_merge)", "unmerge restores the weight, but the layer still counts as merged"),
    _linear(_RESTORE, "        self.linear.weight.sub_(self.lora_B @ self.lora_A)\n        self.weight_before_merge = None", "unmerge subtracts B A without the scaling"),
    _linear(_RESTORE, "        self.linear.weight.add_(self.delta_weight())\n        self.weight_before_merge = None", "unmerge adds the update again instead of taking it away"),
    _linear(_UNMERGE_GUARD + "(self.weight_before_merge)", "        self.linear.weight.sub_(self.delta_weight())",
            "unmerge subtracts the update even from a layer that is not merged"),
    _linear(_DELTA_LINEAR, _DELTA_DOC + "self.lora_B @ self.lora_A", "delta_weight() is B A without the scaling, and so is what merge adds"),
    _linear(_DELTA_LINEAR, _DELTA_DOC + "delta_weight(self.lora_A, self.lora_B, self.lora_alpha, self.r)", "use_rslora is ignored in delta_weight(), and so in merge"),
    _linear(_INIT_LINEAR, _INIT_LINEAR.replace("self.lora_A, self.lora_B)", "self.lora_B, self.lora_A)"),
            "A and B are started the wrong way round: A zero, B drawn", why="the identity at the start holds either way",
            breaks="the first step moves A along a random B: it trains, from another start than peft's",
            shows="which factor moves in the first step"),
    _linear(_B_LINEAR, 'self.register_buffer("lora_B", torch.zeros(out_features, r))', "B is not trained: it is no nn.Parameter, or it is frozen",
            why="it starts as zeros, like a buffer", breaks="B stays zero, and with it the update: the loss doesn't move",
            shows="the count of trainable numbers"),
    _linear(_A_LINEAR, 'self.register_buffer("lora_A", torch.zeros(r, in_features))', "A is not trained: it is no nn.Parameter, or it is frozen"),
    _linear(_FORWARD, _FORWARD.replace("add_update(", "self.scaling * add_update(").replace(", self.scaling)", ", 1.0)"), "the frozen layer's output is scaled too",
            why="a factor pulled out of the sum", breaks="the frozen layer, by α/r, also in a fresh one", shows="a new layer that is not the old one"),
    _linear(_Y, _Y.replace("self.linear(x)", "F.linear(x, self.linear.weight)"), "the frozen layer's bias is left out"),
    _linear(_Y, "        x = self.dropout(x)\n" + _Y, "dropout falls on the frozen layer's input too",
            why="one x for both paths", breaks="the frozen model itself gets noisy in training", shows="the output in training mode with B = 0"),
    _linear(_Y, "        with torch.no_grad():\n            y = self.linear(x)\n        if self.merged:", "the frozen path runs under no_grad: layers below get no gradient through it",
            why="the layer is frozen, so it needs no gradient", breaks="every layer below: its gradient passes through the frozen weight",
            shows="the gradient of x"),
    _linear(_RESTORE, "        self.linear.weight.copy_(self.weight_before_merge)\n        self.weight_before_merge = None\n        self.lora_A.requires_grad_(False)",
            "after unmerge() A is no longer trained"),
    _linear(_IF_MERGED, "        if self.merged:\n            return y.detach()\n", "the merged layer's output is detached: layers below get no gradient"),
    _linear(_MERGE_GUARD, "        if self.merged or self.training:\n            return\n        weight = self.linear.weight", "merge() does nothing in training mode"),
    _linear(_Y, "        y = self.linear(x) * 0\n        if self.merged:", "the frozen layer's output is left out"),
    _linear(_FORWARD, "        if not hasattr(self, 'cached'):\n            self.cached = self.delta_weight().detach()\n        return y + F.linear(self.dropout(x), self.cached)",
            "ΔW is computed once and kept, so that training changes nothing"),
)

# ---------------------------------------------------------------- the answers, and the property

_COUNT = ("r * in_features + out_features * r",)


def _answer(name: str, old: str, new: str, cause: str) -> Mistake:
    return Mistake(f"lora_layer.{name}", (old, new), cause)


_ANSWERS = (
    _answer("parameter_count", *_COUNT, "in_features * out_features", "the whole weight is counted"),
    _answer("parameter_count", *_COUNT, "r * in_features * out_features", "the sizes are multiplied instead of added"),
    _answer("parameter_count", *_COUNT, "r * in_features", "only A is counted"),
    _answer("parameter_count", *_COUNT, "out_features * r", "only B is counted"),
    _answer("parameter_count", *_COUNT, "r * in_features + out_features * r + out_features", "the bias is counted, but it is frozen"),
    _answer("parameter_count", *_COUNT, "4 * (r * in_features + out_features * r)", "bytes are given instead of numbers"),
    _answer("parameter_count", *_COUNT, "in_features * out_features + r * in_features + out_features * r", "the frozen weight is counted too"),
    _answer("parameter_count", *_COUNT, "r * in_features + out_features * r + r * r", "there is an r × r matrix between A and B, which LoRA has not"),
    _answer("parameter_count", *_COUNT, "2 * r * in_features", "both factors are given the width in_features"),
    _answer("break_even_rank", "(in_features * out_features - 1) // (in_features + out_features)",
            "in_features * out_features // (in_features + out_features)", "the rank is the one where both have the *same* number, not fewer"),
    _answer("break_even_rank", "(in_features * out_features - 1) // (in_features + out_features)",
            "(in_features * out_features - 1) // (in_features + out_features) + 1 + 1", "you are past the point where LoRA has more numbers"),
    _answer("break_even_rank", "(in_features * out_features - 1) // (in_features + out_features)",
            "min(in_features, out_features)", "the largest rank that ΔW can have is taken, min(in, out)"),
    _answer("break_even_rank", "(in_features * out_features - 1) // (in_features + out_features)",
            "min(in_features, out_features) // 2", "the rule for a square layer, d/2, is used on one that is not square"),
    _answer("break_even_rank", "(in_features * out_features - 1) // (in_features + out_features)",
            "(in_features + out_features) // 2", "the mean of the two sizes is taken"),
    _answer("moving_factors", '"A drawn, B zero": ("B", "both"),\n        "A zero, B drawn": ("A", "both"),',
            '"A drawn, B zero": ("A", "both"),\n        "A zero, B drawn": ("B", "both"),', "a factor is taken to move when it is not zero itself; it moves when the *other* one is not"),
    _answer("moving_factors", '"A drawn, B zero": ("B", "both"),\n        "A zero, B drawn": ("A", "both"),',
            '"A drawn, B zero": ("B", "B"),\n        "A zero, B drawn": ("A", "A"),', "what moved in the first step is taken to be zero still in the second"),
    _answer("moving_factors", '"A drawn, B zero": ("B", "both"),\n        "A zero, B drawn": ("A", "both"),',
            '"A drawn, B zero": ("both", "both"),\n        "A zero, B drawn": ("both", "both"),', "one zero factor is taken not to matter at step 1"),
    _answer("moving_factors", '"A zero, B zero": ("neither", "neither")', '"A zero, B zero": ("both", "both")', "two zeros are taken to move: each gradient has the other factor in it"),
    _answer("moving_factors", '"A zero, B zero": ("neither", "neither")', '"A zero, B zero": ("neither", "both")', "two zeros are taken to leave zero at step 2, though nothing moved at step 1"),
)

_PUT = '    layer.put("lora_B", torch.randn_like(layer.get("lora_B")))  # with B = 0 there is nothing to merge\n'
_EVAL = "    layer.eval()  # dropout would change the output from call to call\n"
_ROOM = "    room = 1e-4 * before.abs().max()\n"
_CHANGES = "    for change in (layer.merge, layer.merge, layer.unmerge):"


_ALWAYS_FALSE = "accuses every layer: it asks for equality to the last bit, or says False whatever it is given"
_ALWAYS_TRUE = "says True to everything: it never merges, or compares an output with itself"


def _test(old: str, new: str, cause: str) -> Mistake:
    return Mistake("lora_layer.merge_changes_nothing", (old, new), cause)


_PROPERTY = (
    _test(_PUT, "", "leaves B at zero in a fresh layer, where there is nothing to merge"),
    _test(_EVAL, "", "leaves dropout on, and so accuses a right layer in training mode"),
    _test(_ROOM, "    room = 0.0\n", _ALWAYS_FALSE),
    _test(_ROOM, "    room = 1e-5\n", "has a tolerance that doesn't grow with the output, and so accuses a right layer with large numbers"),
    _test("        if (layer(x) - before).abs().max() > room:", "        if not torch.allclose(layer(x), before):", "uses torch.allclose with its own tolerances (1e-5 of each value, 1e-8), narrower than rounding"),
    _test("        if (layer(x) - before).abs().max() > room:", "        if True:", _ALWAYS_FALSE),
    _test(_ROOM, "    room = 1.0 * before.abs().max()\n", "has a tolerance so wide that almost everything passes"),
    _test(_CHANGES, "    for change in (layer.merge,):", "looks after the first merge only"),
    _test(_CHANGES, "    for change in (layer.merge, layer.unmerge):", "does not merge a second time"),
    _test(_CHANGES, "    for change in (layer.merge, layer.merge):", "does not look at unmerge"),
    _test("        change()\n", "        pass\n", _ALWAYS_TRUE),
    _test("        if (layer(x) - before).abs().max() > room:\n            return False\n    return True",
          "        pass\n    return bool((layer(x) - before).abs().max() <= room)", "looks only once, at the end"),
    _test("            return False\n    return True", "            return True\n    return False", "answers the wrong way round"),
    _test("        if (layer(x) - before).abs().max() > room:\n            return False\n", "        layer(x)\n", _ALWAYS_TRUE),
    _test("(layer(x) - before).abs().max() > room", "(layer(x) - before).max() > room", "forgets the absolute value: outputs that fall are not seen"),
)

MISTAKES: tuple[Mistake, ...] = (
    _DELTA + _INIT_MISTAKES + _ADD + _both("lora_layer.LoRALayer") + _LINEAR_ONLY + _both(_LINEAR) + _ANSWERS + _PROPERTY
)
