"""The report in an offline browser: 3D view, charts, sorting, themes, small screens, print."""

import shutil

import cv2
import numpy as np
import pytest
from report_tree import write_run

from apps import report

sync_api = pytest.importorskip('playwright.sync_api', reason='optional, requirements-browser.txt: no playwright')
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
pytestmark = pytest.mark.skipif(not CHROMIUM, reason='no chromium on this machine')
SOFTWARE_WEBGL = ['--use-angle=swiftshader', '--enable-unsafe-swiftshader', '--ignore-gpu-blocklist', '--no-sandbox']


@pytest.fixture(scope='module')
def address(tmp_path_factory):
    """URL of a report on two incomparable runs."""
    root = tmp_path_factory.mktemp('report')
    write_run(root / 'main', frames=60, samples=3)
    write_run(root / 'middle', frames=60, samples=3, seed=1, name='intaghand')
    assert report.main([str(root / 'main'), str(root / 'middle'), '--out', str(root / 'report.html')]) == 0
    return (root / 'report.html').as_uri()


@pytest.fixture(scope='module')
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=SOFTWARE_WEBGL)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, address):
    """Open the page offline; afterwards check that it logged nothing and loaded nothing else."""
    contexts, complaints, requests = [], [], []

    def open_(script='', **options):
        contexts.append(browser.new_context(offline=True, **{'viewport': {'width': 1400, 'height': 900}} | options))
        contexts[-1].add_init_script(script)
        page = contexts[-1].new_page()
        page.set_default_timeout(5000)
        page.on('console', lambda message: complaints.append(message.text))
        page.on('pageerror', lambda error: complaints.append(str(error)))
        page.on('request', lambda request: requests.append(request.url))
        page.goto(address)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert complaints == []
    assert {url for url in requests if not url.startswith('data:')} == {address}


def drawn(page) -> np.ndarray:
    """Screenshot of the settled canvas without its border and focus ring, (H, W, 3) BGR."""
    page.evaluate('() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))')
    content = np.frombuffer(page.locator('#canvas').screenshot(), np.uint8)
    return cv2.imdecode(content, cv2.IMREAD_COLOR)[8:-8, 8:-8].astype(int)


def alike(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether screenshots agree up to antialiasing."""
    return np.abs(a - b).mean() < 0.5


def all_differ(images: list[np.ndarray]) -> bool:
    return not any(alike(a, b) for number, a in enumerate(images) for b in images[:number])


@pytest.fixture
def viewer(open_page):
    page = open_page(viewport={'width': 400, 'height': 700})
    page.get_by_role('button', name='3D view of worst 1, main [A]', exact=True).click()
    return page


def test_view_rotates_zooms_and_resets(viewer):
    first, canvas = drawn(viewer), viewer.locator('#canvas')
    assert first.std() > 10  # the canvas is not blank
    box = canvas.bounding_box()
    x, y = box['x'] + box['width'] / 2, box['y'] + box['height'] / 2
    viewer.mouse.move(x, y)
    viewer.mouse.down()
    viewer.mouse.move(x + 60, y + 20, steps=3)
    viewer.mouse.up()
    seen = [first, drawn(viewer)]
    for key in ('ArrowLeft', 'ArrowUp', '+'):
        canvas.press(key)
        seen.append(drawn(viewer))
    assert all_differ(seen)
    canvas.press('-')
    assert alike(drawn(viewer), seen[-2])
    viewer.mouse.wheel(0, -200)
    assert all_differ([*seen, drawn(viewer)])
    viewer.get_by_role('button', name='Reset the view').click()
    assert alike(drawn(viewer), first)


def test_pinch_zooms(open_page):
    page = open_page(viewport={'width': 400, 'height': 700}, has_touch=True)
    page.get_by_role('button', name='3D view of worst 1, main [A]', exact=True).tap()
    box, before = page.locator('#canvas').bounding_box(), drawn(page)
    middle, session = box['x'] + box['width'] / 2, page.context.new_cdp_session(page)
    for kind, apart in (('touchStart', 40), ('touchMove', 60), ('touchMove', 80), ('touchEnd', None)):
        places = [middle - apart, middle + apart] if apart else []
        points = [{'x': x, 'y': box['y'] + 100, 'id': number} for number, x in enumerate(places)]
        session.send('Input.dispatchTouchEvent', {'type': kind, 'touchPoints': points})
    after = drawn(page)
    covered = [(np.abs(image - image[0, 0]).max(-1) > 30).mean() for image in (before, after)]
    assert 2 < covered[1] / covered[0] < 4.1  # twice as large, except for what leaves the canvas


def test_stage_ground_truth_and_placement_change_the_view(viewer):
    assert viewer.locator('#viewer-state').inner_text() == 'Stage 2, ground truth on, each hand at its own root.'
    seen = [drawn(viewer)]
    for choose in (
        lambda: viewer.locator('#canvas').press('0'),
        lambda: viewer.get_by_label('1', exact=True).check(),
        lambda: viewer.get_by_label('off', exact=True).check(),
        lambda: viewer.get_by_label('right hand at the predicted offset').check(),
        lambda: viewer.get_by_label('only', exact=True).check(),
        lambda: viewer.get_by_role('button', name='Next sample').click(),
    ):
        choose()
        seen.append(drawn(viewer))
    assert all_differ(seen)
    assert (
        viewer.locator('#viewer-state').inner_text()
        == 'Stage 1, ground truth only, right hand at the predicted offset.'
    )
    assert viewer.locator('#viewer-title').inner_text() == 'main [A], median 1'
    viewer.keyboard.press('Escape')
    assert not viewer.locator('dialog').is_visible()


def test_prediction_is_coloured_and_ground_truth_is_grey(viewer):
    def tints(kind):
        """Number of bluish, orange and grey pixels, excluding the background."""
        viewer.get_by_label(kind, exact=True).check()
        image = drawn(viewer)
        lean, hand = image[..., 0] - image[..., 2], image.max(-1) < 240
        return (lean > 25).sum(), (lean < -25).sum(), (hand & (abs(lean) <= 25)).sum()

    blue, orange, grey = tints('off')
    assert min(blue, orange) > 20 * grey
    blue, orange, grey = tints('only')
    assert grey > 1000 and blue == orange == 0


def test_focus_is_visible_and_the_keyboard_reaches_every_control(open_page):
    page = open_page()
    button = page.get_by_role('button', name='3D view of worst 1, main [A]', exact=True)
    button.focus()
    page.keyboard.press('Enter')
    ring = page.locator('#canvas').evaluate('(e) => [document.activeElement === e, getComputedStyle(e).outlineStyle]')
    assert ring == [True, 'solid']
    reached = set()
    for _ in range(14):
        page.keyboard.press('Tab')
        reached.add(page.evaluate('document.activeElement.id || document.activeElement.name'))
    assert {'stage', 'truth', 'place', 'zoom-in', 'zoom-out', 'reset', 'previous', 'next', 'close'} <= reached
    page.keyboard.press('Escape')
    assert button.evaluate('(e) => document.activeElement === e')


def test_without_webgl_a_notice_and_the_images_are_shown(open_page):
    page = open_page(script='HTMLCanvasElement.prototype.getContext = () => null')
    assert page.locator('#no-viewer').is_visible() and page.locator('.pictures img').first.is_visible()
    assert page.locator('.open-viewer:visible').count() == 0


def test_chart_values_are_available_to_pointer_and_keyboard(open_page):
    page = open_page()
    plot = page.locator('.plot', has=page.get_by_role('img', name='PCK, left hand')).first
    plot.scroll_into_view_if_needed()
    plot.hover(position={'x': 100, 'y': 60})
    by_pointer = plot.locator('.tip').inner_text()
    assert by_pointer.startswith('threshold ') and 'main [A]: ' in by_pointer and 'middle [B]: ' in by_pointer
    page.mouse.move(0, 0)
    assert not plot.locator('.tip').is_visible()
    reader = plot.get_by_role('slider')
    reader.press('Home')
    reader.press('ArrowRight')
    assert plot.locator('.tip').inner_text().startswith('threshold 1\n')
    assert reader.get_attribute('aria-valuetext').startswith('threshold 1, main [A]: ')


def test_tables_sort_by_pointer_and_keyboard(open_page):
    page = open_page()
    table = page.locator('.sortable').first

    def column(number):
        return [float(text) for text in table.locator(f'tbody tr > :nth-child({number})').all_inner_texts()]

    assert column(2) == sorted(column(2), reverse=True) and len(column(2)) == 50
    table.get_by_role('button', name='root mm').click()
    assert column(6) == sorted(column(6), reverse=True)
    table.get_by_role('button', name='root mm').press('Enter')
    assert column(6) == sorted(column(6))
    assert table.locator('th[aria-sort]').all_inner_texts() == ['root mm']
    table.get_by_role('button', name='file').click()
    files = table.locator('.file').all_inner_texts()
    assert files == sorted(files)


def test_page_fits_the_screen_width(open_page):
    page = open_page()
    for width in (1400, 400, 360):
        page.set_viewport_size({'width': width, 'height': 800})
        assert page.evaluate('document.documentElement.scrollWidth') == width
        # Wider content scrolls inside its own box.
        assert (
            page.evaluate("""[...document.querySelectorAll('main *')].filter((e) => !e.closest('.scroll')
          && e.getBoundingClientRect().right > innerWidth + 0.5).length""")
            == 0
        )
    page.get_by_role('button', name='3D view of worst 1, main [A]', exact=True).click()
    assert page.evaluate('document.querySelector("dialog").scrollWidth <= document.querySelector("dialog").clientWidth')


def test_theme_follows_the_system_and_the_button(open_page):
    def ground(page):
        return page.evaluate('getComputedStyle(document.body).backgroundColor')

    light, dark = open_page(color_scheme='light'), open_page(color_scheme='dark')
    as_light, as_dark = ground(light), ground(dark)
    assert as_light != as_dark
    light.get_by_role('button', name='Dark mode').click()
    dark.get_by_role('button', name='Light mode').click()
    assert (ground(light), ground(dark)) == (as_dark, as_light)


def test_print_omits_controls_and_keeps_charts_and_images(open_page):
    page = open_page(color_scheme='dark', viewport={'width': 794, 'height': 1123})
    page.emulate_media(media='print', color_scheme='dark')
    assert page.locator('button:visible').count() == page.locator('th button').count()  # column headers stay as text
    assert page.locator('nav:visible, dialog:visible, .reader:visible, #theme:visible').count() == 0
    assert page.locator('.chart svg:visible').count() == page.locator('.chart svg').count() > 20
    assert page.locator('.pictures img:visible').count() == 3 * 6
    assert page.evaluate('getComputedStyle(document.querySelector(".card")).breakInside') == 'avoid'
    assert page.evaluate('document.documentElement.scrollWidth') == 794
    assert page.evaluate('getComputedStyle(document.querySelector("section")).backgroundColor') == 'rgb(255, 255, 255)'
