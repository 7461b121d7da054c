"""Files of the released detectors' shape are read as all others, and evaluate to the recorded detections."""
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dense_reference
import models
from builders import Payload, put
from models.dense import NETWORKS, classes_of_dense
from models.released import RELEASED_DENSE
from models.weights import apply_weights, load_weights
from recipes import RECIPES, Run
from tasks.detection import coco_classes
from training.evaluation import load_task
from utils import UserError

pytestmark = pytest.mark.usefixtures('one_thread')

XT = 'retinanet_moganet_xtiny_1x'
SHAPES = dense_reference.load('state_dict_shapes')['shapes']
RECORDED = dense_reference.load('retinanet')
CONFIG = "model = dict(backbone=dict(type='MogaNet_feat', arch='x-tiny', frozen_stages={}, norm_eval=False, {}))"


def write(path: Path, *, frozen: int = -1, gate: str = 'attn_force_fp32=False', **meta: object) -> None:
    """A file as mmdet writes it, with the weights of the recording."""
    state = dense_reference.seeded_state_dict(SHAPES['retinanet_moganet_xtiny_fpn_1x_coco'])
    meta = {'epoch': 12, 'iter': 87960, 'mmdet_version': '2.26.0', 'config': CONFIG.format(frozen, gate), **meta}
    torch.save({'meta': meta, 'state_dict': state, 'optimizer': {'state': {}, 'param_groups': []}}, path)


def test_a_released_file_evaluates_to_the_recorded_detections(cache):
    put(cache, XT, write)
    asked = replace(RECIPES['default'], model='')
    task, model, weights = load_task(f'released:{XT}', asked, Run(eval=True, device='cpu'), torch.device('cpu'))
    assert task.recipe == replace(RECIPES[XT], num_classes=80) and task.classes == coco_classes()
    assert weights.meta['box_ap'] == 39.7 and weights.format == 'mmcv'
    images = dense_reference.images(1, 3, 256, 320, seed=100, valid=[[240, 300]])
    found, = model.predict(images, [(240, 300)], [(173, 217)])
    boxes, scores = RECORDED['padded/detections/boxes'].split((4, 1), dim=1)
    assert torch.equal(found['labels'], RECORDED['padded/detections/labels'].long()) and len(boxes) == 100
    # In pixels; the maps' round-off of 1e-6 times boxes of up to 320 pixels
    assert (found['boxes'] - boxes).abs().max() <= 1e-3 and (found['scores'] - scores[:, 0]).abs().max() <= 1e-5


def test_a_config_that_differs_from_the_recipe_is_shown_and_names_the_gate(cache):
    put(cache, XT, write)
    assert 'unlike the recipe' not in str(load_weights(f'released:{XT}'))
    put(cache, XT, write, frozen=1, gate="'attn_force_fp32': True", CLASSES=tuple(coco_classes()))
    read = load_weights(f'released:{XT}')
    assert 'it was trained with frozen_stages=1, attn_force_fp32=True' in str(read)
    assert read.gate == 'double' and read.meta['classes'] == tuple(coco_classes())
    task, model, _ = load_task(f'released:{XT}', replace(RECIPES['default'], model=''), Run(eval=True),
                               torch.device('cpu'))
    assert task.recipe.gate == 'double' and model.backbone.blocks1[0].attn.double_gate


def test_other_classes_and_a_classifier_take_what_fits(tmp_path):
    write(tmp_path / 'file.pth')
    read = load_weights(tmp_path / 'file.pth')
    assert read.dense and classes_of_dense(read.state_dict, RECIPES[XT]) == 80
    model = models.create_dense(XT, 3)
    with pytest.raises(UserError, match=r'retina_cls.weight is 720 x 256 x 3 x 3 in the file and 27 x 256'):
        apply_weights(model, read)
    report = apply_weights(model, read, drop_classifier=True)
    assert report.dropped == ['bbox_head.retina_cls.weight', 'bbox_head.retina_cls.bias'] and not report.missing
    assert torch.equal(model.bbox_head.retina_reg.weight, read.state_dict['bbox_head.retina_reg.weight'])
    classifier = models.create_model('moganet_xtiny', num_classes=5)
    report = apply_weights(classifier, read, drop_classifier=True)
    assert torch.equal(classifier.norm4.weight, read.state_dict['backbone.norm4.weight'])
    assert report.missing == ['head.weight', 'head.bias'] and len(report.unexpected) == 36


def test_every_row_is_a_recorded_model_and_the_recipe_of_its_name_where_its_network_is_known():
    detectors = {name: row for name, row in RELEASED_DENSE.items() if 'det-weights' in row.url}
    assert len(detectors) == 17
    stems = {os.path.basename(row.url).removesuffix('.pth') for row in detectors.values()}
    assert len(stems) == 17 and stems <= SHAPES.keys()
    for name, recipe in RECIPES.items():
        if getattr(recipe, 'expected_box_ap', None) and name != 'cascade_mask_rcnn_moganet_large_giou_3x':
            assert name in RELEASED_DENSE and recipe.network in NETWORKS


@pytest.mark.parametrize('content,said', [
    ({'meta': {}, 'state_dict': Payload(os.getcwd)}, 'would have to be imported and called'),
    ({'meta': {}, 'state_dict': {'backbone.a': torch.ones(1), 'neck.b': torch.ones(1)}}, 'do not fit')])
def test_the_rules_of_safety_hold_for_detectors(content, said, tmp_path):
    torch.save(content, tmp_path / 'file.pth')
    with pytest.raises(UserError, match=said):
        apply_weights(models.create_dense(XT), load_weights(tmp_path / 'file.pth'))
