"""One hand in millimetres with the interface of the published layer."""

import pytest
import torch
from mano_files import write_mano_files

from manopth import ManoError, ManoLayer, TwoHandLayer
from manopth.rotations import axis_angle_to_matrix, gram_schmidt_6d_to_matrix, symmetric_6d_to_matrix
from manopth.tables import LEFT, PUBLISHED_LEFT_MIDDLE_TIP, RIGHT, SIDES, TIP_VERTICES

PUBLISHED_TIPS = ((*TIP_VERTICES[:2], PUBLISHED_LEFT_MIDDLE_TIP, *TIP_VERTICES[3:]), TIP_VERTICES)


def parameters(batch=2, seed=0):
    """root (B, 3), pose (B, 45), betas (B, 10)."""
    generator = torch.Generator().manual_seed(seed)
    return [
        scale * torch.randn(batch, size, generator=generator, dtype=torch.float64)
        for size, scale in ((3, 1.0), (45, 0.5), (10, 1.0))
    ]


def one_hand(standin, side='right', **options):
    return ManoLayer(model=standin[SIDES.index(side)], side=side, dtype=torch.float64, **options)


@pytest.fixture(scope='module')
def both(standin):
    return TwoHandLayer(standin, tip_vertices=PUBLISHED_TIPS, dtype=torch.float64)


def in_millimetres(both, hand, root, axis_angle, betas, **options):
    hands = both(*(p[:, None].expand(-1, 2, -1) for p in (root, axis_angle, betas)), use_pca=False, **options)
    return tuple(1000 * points[:, hand] for points in hands)


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-9, rtol=0)


def test_code_written_for_the_published_layer_runs(standin, tmp_path):
    """The calls and attributes that public code uses, on official files."""
    from manopth.manolayer import ManoLayer

    mano_root = str(write_mano_files(tmp_path / 'mano/models', standin))
    layer = ManoLayer(mano_root=mano_root, use_pca=True, ncomps=6, flat_hand_mean=False, side='right', center_idx=0)
    verts, joints = layer(torch.rand(10, 9), torch.rand(10, 10))
    assert verts.shape == (10, 778, 3) and joints.shape == (10, 21, 3) and (joints[:, 0] == 0).all()
    assert 150 < (joints[:, 12] - joints[:, 0]).norm(dim=-1).mean() < 220  # mm from the wrist to the middle fingertip
    verts, joints = layer(torch.zeros(4, 9), th_betas=torch.zeros(4, 10), th_trans=torch.ones(4, 3))
    assert (joints[:, 0] > 900).all()  # the translation is in metres

    rest = layer.th_v_template + torch.matmul(layer.th_shapedirs, layer.th_betas.transpose(0, 1)).permute(2, 0, 1)
    assert torch.matmul(layer.th_J_regressor, rest).shape == (1, 16, 3)
    assert layer.th_faces.numpy().shape == (1538, 3) and layer.th_faces.dtype == torch.int64
    coefficients = torch.rand(2, 6)
    assert (layer.th_hands_mean + coefficients.mm(layer.th_selected_comps)).shape == (2, 45)
    assert layer.th_comps.shape == (45, 45) and layer.th_posedirs.shape == (778, 3, 135)
    assert layer.th_weights.shape == (778, 16) and layer.kintree_parents[1:4] == [0, 1, 2]
    assert (layer.rot, layer.ncomps, layer.side, layer.center_idx) == (3, 6, 'right', 0)
    assert ManoLayer(mano_root=mano_root, use_pca=False).ncomps == 45


def test_positional_arguments_follow_the_published_order(standin, tmp_path):
    layer = ManoLayer(9, False, 12, 'left', str(write_mano_files(tmp_path, standin)), True, 'rot6d', 'axisang', True)
    assert (layer.center_idx, layer.flat_hand_mean, layer.ncomps, layer.side) == (9, False, 12, 'left')
    assert (layer.use_pca, layer.root_rot_mode, layer.joint_rot_mode, layer.robust_rot) == (
        True,
        'rot6d',
        'axisang',
        True,
    )


@pytest.mark.parametrize('side', SIDES)
@pytest.mark.parametrize('use_pca', [True, False])
@pytest.mark.parametrize('flat', [True, False])
def test_one_hand_equals_the_two_hand_layer(standin, both, side, use_pca, flat):
    root, pose, betas = parameters()
    hand = SIDES.index(side)
    given = pose[:, :7] if use_pca else pose
    axis_angle = given @ both.pose_components[hand, :7] if use_pca else given
    if not flat:
        axis_angle = axis_angle + both.pose_mean[hand]
    layer = one_hand(standin, side, use_pca=use_pca, flat_hand_mean=flat, ncomps=7)
    assert_same(layer(torch.cat([root, given], -1), betas), in_millimetres(both, hand, root, axis_angle, betas))


def test_left_middle_tip_is_the_published_vertex(standin):
    for side, tip in (('left', 445), ('right', 444)):
        verts, joints = one_hand(standin, side)(torch.zeros(1, 9, dtype=torch.float64))
        assert torch.equal(joints[:, 12], verts[:, tip])


def test_defaults_are_the_published_ones(standin):
    """Six components about the flat hand, an axis-angle root, no centring, mean shape."""
    root, pose, _ = parameters()
    default = one_hand(standin)
    explicit = one_hand(
        standin,
        center_idx=None,
        flat_hand_mean=True,
        ncomps=6,
        use_pca=True,
        root_rot_mode='axisang',
        joint_rot_mode='axisang',
        robust_rot=False,
    )
    given = torch.cat([root, pose[:, :6]], -1)
    mean_shape = torch.zeros(2, 10, dtype=torch.float64)
    assert_same(default(given), explicit(given, mean_shape))
    verts, _ = default(torch.zeros(1, 9, dtype=torch.float64))
    torch.testing.assert_close(verts, 1000 * default.th_v_template)


@pytest.mark.parametrize('robust, to_matrix', [(True, symmetric_6d_to_matrix), (False, gram_schmidt_6d_to_matrix)])
def test_6d_root_and_matrices(standin, robust, to_matrix):
    _, pose, betas = parameters()
    six = torch.randn(2, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    layer = one_hand(standin, root_rot_mode='rot6d', robust_rot=robust, ncomps=45)
    fingers = axis_angle_to_matrix((pose @ layer.th_comps).unflatten(-1, (15, 3)))
    matrices = torch.cat([to_matrix(six)[:, None], fingers], 1)
    expected = layer(torch.cat([six, pose], -1), betas)
    by_matrix = one_hand(standin, joint_rot_mode='rotmat')
    assert_same(by_matrix(matrices, betas), expected)
    assert_same(by_matrix(1.5 * matrices, betas), expected)  # projected onto rotations


@pytest.mark.parametrize('center', [0, 4, 9])
def test_centring_and_translation(standin, center):
    root, pose, betas = parameters()
    given = torch.cat([root, pose[:, :6]], -1)
    plain, centred = one_hand(standin), one_hand(standin, center_idx=center)
    verts, joints = plain(given, betas)
    middle = joints[:, center : center + 1]
    for trans in (None, torch.zeros(1), torch.zeros(2, 3, dtype=torch.float64)):
        assert_same(centred(given, betas, trans), (verts - middle, joints - middle))
    trans = torch.tensor([[0.1, 0.2, 0.3], [0, 0, 0]], dtype=torch.float64)  # any non-zero entry replaces centring
    moved = 1000 * trans[:, None]
    assert_same(centred(given, betas, trans), (verts + moved, joints + moved))
    assert_same(centred(given, betas, trans[:1]), (verts + moved[:1], joints + moved[:1]))


def test_betas_of_one_row_of_the_batch_and_shared(standin):
    root, pose, betas = parameters(batch=3)
    layer, given = one_hand(standin), torch.cat([root, pose[:, :6]], -1)
    assert_same(layer(given, betas[:1]), layer(given, betas[:1].expand(3, -1)))
    mean = betas.mean(0, keepdim=True)
    for share in (True, torch.Tensor([1])):
        assert_same(layer(given, betas, share_betas=share), layer(given, mean))
    for zeros in (None, torch.zeros(1), torch.zeros(1, 10), torch.zeros(3, 10)):
        assert_same(layer(given, zeros), layer(given))


def test_root_palm_replaces_the_wrist(standin):
    root, pose, betas = parameters()
    given = torch.cat([root, pose[:, :6]], -1)
    verts, joints = one_hand(standin)(given, betas)
    palm = (verts[:, 95] + verts[:, 22]) / 2
    for flag in (True, torch.Tensor([1])):
        same, moved = one_hand(standin)(given, betas, root_palm=flag)
        assert_same((same, moved[:, 0], moved[:, 1:]), (verts, palm, joints[:, 1:]))
    _, centred = one_hand(standin, center_idx=0)(given, betas, root_palm=True)
    assert_same(centred[:, 1:], (joints - palm[:, None])[:, 1:])


def test_edited_arrays_take_effect(standin):
    """Public code mirrors the left shape directions in place; the joints have to follow the vertices."""
    root, pose, betas = parameters()
    layer, given = one_hand(standin, 'left'), torch.cat([root, pose[:, :6]], -1)
    layer.th_shapedirs[:, 0] *= -1
    flat = torch.zeros_like(given)
    verts, joints = layer(flat, betas)
    assert_same(joints[:, [0, 5, 9, 17, 13, 1]], (layer.th_J_regressor @ verts)[:, [0, 1, 4, 7, 10, 13]])
    assert not torch.allclose(verts, one_hand(standin, 'left')(flat, betas)[0])


def test_left_shape_directions_are_corrected_on_request(standin, tmp_path):
    root, pose, betas = parameters()
    given, folder = torch.cat([root, pose[:, :6]], -1), write_mano_files(tmp_path, standin)
    expected = one_hand(standin, 'left')(given, betas)
    options = {'mano_root': folder, 'side': 'left', 'dtype': torch.float64}
    assert_same(ManoLayer(**options, correct_left_shape=True)(given, betas), expected)
    stored = ManoLayer(**options)
    torch.testing.assert_close(stored.th_shapedirs, torch.tensor(standin[RIGHT].shape_dirs))
    assert not torch.allclose(stored(given, betas)[0], expected[0])
    (folder / 'MANO_RIGHT.pkl').unlink()
    ManoLayer(**options)  # the published layer does not need the other file, either


def test_gradients_reach_every_input(standin):
    inputs = [torch.zeros(1, size, requires_grad=True) for size in (9, 10, 3)]
    layer = ManoLayer(model=standin[RIGHT])
    with torch.no_grad():
        inputs[1] += 0.1
        inputs[2] += 0.1
    verts, joints = layer(*inputs)
    (verts.square().sum() + joints.sum()).backward()
    for value in inputs:
        assert value.grad.isfinite().all() and (value.grad != 0).any()


def test_arrays_are_not_saved_and_ignored_in_old_checkpoints(standin):
    network = torch.nn.ModuleDict({'head': torch.nn.Linear(2, 2), 'mano': ManoLayer(model=standin[RIGHT])})
    assert set(network.state_dict()) == {'head.weight', 'head.bias'}
    published = network.state_dict() | {'mano.th_betas': torch.ones(1, 10), 'mano.th_faces': torch.zeros(1538, 3)}
    network.load_state_dict(published, strict=True)
    assert (network['mano'].th_betas == 0).all() and set(published) > {'mano.th_betas'}
    with pytest.raises(RuntimeError, match=r'mano\.other'):
        network.load_state_dict(published | {'mano.other': torch.ones(1)})


@pytest.mark.parametrize(
    'options, message',
    [
        ({'side': 'both'}, "side is 'both'; it must be one of left, right"),
        ({'root_rot_mode': 'quaternion'}, "root_rot_mode is 'quaternion'; it must be one of axisang, rot6d"),
        ({'joint_rot_mode': 'rot6d'}, "joint_rot_mode is 'rot6d'; it must be one of axisang, rotmat"),
        ({'ncomps': 0}, 'ncomps is 0; it must be between 1 and 45'),
        ({'ncomps': 46}, 'ncomps is 46'),
        ({'mano_root': 'no/such/folder'}, r'no/such/folder/MANO_RIGHT\.pkl is missing'),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ManoError, match=message):
        ManoLayer(**options)


def test_model_of_the_other_side_is_refused(standin):
    with pytest.raises(ManoError, match="side is 'right', but the model is a left hand"):
        ManoLayer(model=standin[LEFT])


@pytest.mark.parametrize(
    'arguments, message',
    [
        ([(2, 48)], r'th_pose_coeffs has shape \(2, 48\); it must be \(B, 9\): 3 numbers .* 6 of the pose'),
        ([(2, 16, 3, 3)], r'th_pose_coeffs has shape \(2, 16, 3, 3\)'),
        ([(2, 9), (10,)], r'th_betas has shape \(10,\); it must be \(2, 10\) or \(1, 10\)'),
        ([(2, 9), (3, 10)], r'th_betas has shape \(3, 10\)'),
        ([(2, 9), (2, 10), (3,)], r'th_trans has shape \(3,\); it must be \(2, 3\) or \(1, 3\)'),
    ],
)
def test_bad_shapes(standin, arguments, message):
    with pytest.raises(ManoError, match=message):
        ManoLayer(model=standin[RIGHT])(*(torch.ones(shape) for shape in arguments))
    with pytest.raises(ManoError, match=r'it must be \(B, 16, 3, 3\)'):
        ManoLayer(model=standin[RIGHT], joint_rot_mode='rotmat')(torch.ones(2, 48))


def test_empty_batch(standin):
    verts, joints = one_hand(standin, center_idx=9)(torch.zeros(0, 9, dtype=torch.float64), torch.zeros(0, 10))
    assert verts.shape == (0, 778, 3) and joints.shape == (0, 21, 3)
