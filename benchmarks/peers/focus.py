"""Other ways to the focus score and to the weights, at the semantics of ours."""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity


def token_loop_focus(hidden_states: Tensor, visual_mask: Tensor, completion_mask: Tensor) -> Tensor:
    """The cosine of one token after the other, each read back to the host, as trainers do without a kernel."""
    focus = torch.zeros(visual_mask.shape)
    for row in range(hidden_states.shape[0]):
        prototype = hidden_states[row, visual_mask[row]].mean(0)
        for position in completion_mask[row].nonzero().flatten().tolist():
            focus[row, position] = cosine_similarity(hidden_states[row, position], prototype, dim=0).item()
    return focus.to(hidden_states.device)


def dense_focus(hidden_states: Tensor, visual_mask: Tensor, completion_mask: Tensor) -> Tensor:
    """Whole-tensor torch: prototypes by a masked sum, cosines of every position, then the mask."""
    states = hidden_states.float()
    visual = visual_mask.unsqueeze(-1)
    prototype = (states * visual).sum(1) / visual.sum(1)
    return cosine_similarity(states, prototype[:, None], dim=-1) * completion_mask


def token_loop_weights(focus: Tensor, completion_mask: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The `paper` recipe token by token and group by group in Python."""
    rows, length = focus.shape
    token_weights, scores = torch.ones(rows, length), []
    for row in range(rows):
        places = completion_mask[row].nonzero().flatten().tolist()
        count = len(places)
        rho = [(focus[row, place].item() + 1) / 2 for place in places]
        tail = range(count // 2, count)
        opened = sorted((rho[t] for t in tail), reverse=True)[max(1, int(len(tail) * 0.2)) - 1]
        weights = [
            value * (1 + 0.3 * (t + 1) / count) if t in tail and value >= opened else value
            for t, value in enumerate(rho)
        ]
        low, high = min(weights), max(weights)
        scaled = [(value - low) / (high - low) for value in weights]
        mean = sum(scaled) / count
        for place, value in zip(places, scaled, strict=True):
            token_weights[row, place] = 1 + value - mean
        scores.append(sum(weights))
    trajectory_weights = torch.ones(rows)
    for group in set(group_ids.tolist()):
        members = [row for row in range(rows) if group_ids[row].item() == group]
        values = [scores[row] for row in members]
        low, high = min(values), max(values)
        scaled = [(value - low) / (high - low) for value in values]
        for row, value in zip(members, scaled, strict=True):
            trajectory_weights[row] = 1 + value - sum(scaled) / len(scaled)
    return token_weights.to(focus.device), trajectory_weights.to(focus.device)
