"""The live view: one canvas component that text, heatmap and figures share."""

from app.heatmap.component import css, live_view

__all__ = ["css", "live_view"]
