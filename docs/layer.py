"""Draw docs/layer.svg and docs/layer-dark.svg: one MoE layer over three ranks.

``make pages`` runs it, and a test fails while the committed files differ from what it draws.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent

# Top-2 of 6 experts: the experts of each token, two tokens and two experts on each of three ranks.
ROUTES = ((0, 3), (2, 4), (1, 2), (2, 5), (0, 2), (1, 4))
PER_RANK = 2

WIDTH, HEIGHT = 920, 386
FIRST_LANE, LANE, LANE_HEIGHT = 70, 106, 92  # top of rank 0, distance and height of lanes
TOKENS, ROUTER, EXPERTS, SUMS, OUTPUTS = 104, 152, 432, 734, 836  # left edges
ROUTER_WIDTH, EXPERT_WIDTH, SUM_WIDTH = 84, 152, 66
CELL = 22

# Text, faint text, lane, box, line of boxes, then a colour for the tokens of each rank.
LIGHT = ("#1f2328", "#59636e", "#f3f5f8", "#ffffff", "#c2cad3", ("#0969da", "#bc4c00", "#1a7f37"))
DARK = ("#e6edf3", "#9aa4af", "#1b222b", "#0f141a", "#47525e", ("#58a6ff", "#f0883e", "#3fb950"))

HEADINGS = (
    (TOKENS + CELL / 2, "tokens", ""),
    (ROUTER + ROUTER_WIDTH / 2, "route", "ids, weights"),
    ((ROUTER + ROUTER_WIDTH + EXPERTS) / 2, "dispatch", "plan, quantise, send, gather"),
    (EXPERTS + EXPERT_WIDTH / 2, "experts", "rows sorted by expert"),
    ((EXPERTS + EXPERT_WIDTH + SUMS) / 2, "combine", "send back"),
    (SUMS + SUM_WIDTH / 2, "", "weighted sum"),
    (OUTPUTS + CELL / 2, "tokens", ""),
)


def token_y(token: int) -> float:
    """Middle of a token."""
    rank, place = divmod(token, PER_RANK)
    return FIRST_LANE + rank * LANE + LANE_HEIGHT * (0.27 + 0.46 * place)


def row_x(row: int) -> float:
    """Left edge of a row in the box of its expert."""
    return EXPERTS + 10 + row * (CELL + 5)


def draw(palette: tuple[str, str, str, str, str, tuple[str, ...]]) -> str:
    """The picture in one palette."""
    text, faint, lane, box, border, colours = palette
    parts = []

    def rect(
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str,
        stroke: str = "none",
        radius: int = 4,
    ) -> None:
        parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius}" '
            f'fill="{fill}" stroke="{stroke}"/>'
        )

    def label(
        x: float,
        y: float,
        words: str,
        size: int = 13,
        fill: str = text,
        weight: str = "normal",
    ) -> None:
        parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{fill}" font-weight="{weight}" '
            f'text-anchor="middle">{words}</text>'
        )

    def cell(x: float, y: float, token: int) -> None:
        rect(x, y - CELL / 2, CELL, CELL, colours[token // PER_RANK])
        label(x + CELL / 2, y + 4.5, str(token), 12, palette[3], "bold")

    def curve(x: float, y: float, to_x: float, to_y: float, token: int) -> None:
        middle = (x + to_x) / 2
        parts.append(
            f'<path d="M{x:g} {y:g}C{middle:g} {y:g} {middle:g} {to_y:g} {to_x:g} {to_y:g}" '
            f'fill="none" stroke="{colours[token // PER_RANK]}" stroke-width="1.6" '
            'stroke-opacity="0.8"/>'
        )

    for x, heading, note in HEADINGS:
        label(x, 26, heading, 15, text, "bold")
        label(x, 46, note, 12, faint)
    ranks = len(ROUTES) // PER_RANK
    for rank in range(ranks):
        top = FIRST_LANE + rank * LANE
        middle = top + LANE_HEIGHT / 2
        rect(12, top, WIDTH - 24, LANE_HEIGHT, lane, radius=8)
        label(52, middle + 5, f"rank {rank}", 14, text, "bold")
        rect(ROUTER, top + 12, ROUTER_WIDTH, LANE_HEIGHT - 24, box, border)
        label(ROUTER + ROUTER_WIDTH / 2, middle + 5, "router")
        rect(SUMS, top + 12, SUM_WIDTH, LANE_HEIGHT - 24, box, border)
        label(SUMS + SUM_WIDTH / 2, middle + 5, "Σ w · y")
    for token, experts in enumerate(ROUTES):
        y = token_y(token)
        curve(TOKENS + CELL, y, ROUTER, y, token)
        curve(SUMS + SUM_WIDTH, y, OUTPUTS, y, token)
        for expert in experts:
            curve(ROUTER + ROUTER_WIDTH, y, EXPERTS, token_y(expert), token)
            curve(EXPERTS + EXPERT_WIDTH, token_y(expert), SUMS, y, token)
    for token in range(len(ROUTES)):
        cell(TOKENS, token_y(token), token)
        cell(OUTPUTS, token_y(token), token)
    for expert in range(ranks * PER_RANK):
        y = token_y(expert)
        rect(EXPERTS, y - 18, EXPERT_WIDTH, 36, box, border)
        rows = [token for token, experts in enumerate(ROUTES) if expert in experts]
        for row, token in enumerate(rows):
            cell(row_x(row), y, token)
        label(EXPERTS + EXPERT_WIDTH - 12, y + 5, f"E{expert}", 12, faint)
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="system-ui, sans-serif" role="img">\n'
        "<title>Tokens of three ranks go to their top-2 of 6 experts and back</title>\n"
        f"{body}\n</svg>\n"
    )


def pictures() -> dict[str, str]:
    """The content of each file, by its name."""
    return {"layer.svg": draw(LIGHT), "layer-dark.svg": draw(DARK)}


if __name__ == "__main__":
    for name, content in pictures().items():
        (FOLDER / name).write_text(content, encoding="utf-8")
