"""Routing attention: tokens attend within clusters that learned centroids pick by content."""

from kernels.cluster.centroids import (
    Centroids,
    commitment_loss,
    init_centroids,
    kmeans_init,
    kmeans_step,
    update_centroids,
)
from kernels.cluster.routing import routing_attention
from kernels.cluster.step import RoutingState, init_routing_state, routing_state, routing_step

__all__ = [
    "Centroids",
    "RoutingState",
    "commitment_loss",
    "init_centroids",
    "init_routing_state",
    "kmeans_init",
    "kmeans_step",
    "routing_attention",
    "routing_state",
    "routing_step",
    "update_centroids",
]
