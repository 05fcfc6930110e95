"""Visualization of instance segmentation. This module imports mmdet."""

import numpy as np
from mmdet.structures.mask import bitmap_to_polygon
from mmdet.structures.mask.structures import BaseInstanceMasks
from mmdet.visualization import DetLocalVisualizer
from mmengine.structures import InstanceData


class ClassColorVisualizer(DetLocalVisualizer):
    """Draws each mask in the colour of its class, so that ground truth and prediction can be compared.

    mmdet's own visualizer adds random numbers to the colour of each mask. This class is not registered, so that nothing
    else imports mmdet; a config gives its full path:

        visualizer=dict(type='swinv2_mm.engine.det_visualization.ClassColorVisualizer')
    """

    def _draw_instances(
        self, image: np.ndarray, instances: InstanceData, classes: list[str], palette: list[tuple]
    ) -> np.ndarray:
        if 'masks' in instances:
            masks = instances.masks
            masks = masks.to_ndarray() if isinstance(masks, BaseInstanceMasks) else np.asarray(masks)
            self.set_image(image)
            contours = [contour for mask in masks for contour in bitmap_to_polygon(mask)[0]]
            self.draw_polygons(contours, edge_colors='w', alpha=self.alpha)
            colors = [tuple(palette[label]) for label in instances.labels]
            self.draw_binary_masks(masks.astype(bool), colors=colors, alphas=self.alpha)
            image = self.get_image()
            instances = instances.clone()
            instances.pop('masks')
        return super()._draw_instances(image, instances, classes, palette)
