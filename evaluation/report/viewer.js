'use strict';

// WebGL2 view of one sample: predicted and ground-truth hands, in mm. The data use camera axes (x right, y down,
// z forward); y and z are negated on unpacking.

const VERTEX_SHADER = `#version 300 es
uniform mat4 projection; uniform mat3 rotation; uniform vec3 place; uniform float distance_;
in vec3 position, normal;
out vec3 eye, facing;
void main() {
  eye = rotation * (position + place) - vec3(0, 0, distance_);
  facing = rotation * normal;
  gl_Position = projection * vec4(eye, 1);
}`;
// Headlight shading of both sides of a face. Translucent surfaces become more opaque towards the silhouette.
const FRAGMENT_SHADER = `#version 300 es
precision highp float;
uniform vec4 colour;
in vec3 eye, facing;
out vec4 pixel;
void main() {
  float light = abs(dot(normalize(facing), normalize(eye)));
  float alpha = colour.a + (1.0 - colour.a) * 0.9 * pow(1.0 - light, 2.0);
  float ambient = colour.a < 1.0 ? 0.85 : 0.35;
  pixel = vec4(colour.rgb * (ambient + (1.0 - ambient) * light) * alpha, alpha);
}`;
const FIELD_OF_VIEW = 0.5; // vertical, rad
const TRUTH_COLOUR = [0.58, 0.59, 0.61]; // visible on both the light and the dark background
const VEIL = 0.28; // opacity of the ground truth, seen head-on

function bytesOf(base64) {
  return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0)).buffer;
}

/** base64 of int16 (2, 778, 3) in multiples of step -> a Float32Array per hand, y up and z towards the viewer. */
function unpackHands(base64, step) {
  const values = Float32Array.from(new Int16Array(bytesOf(base64)), (value, i) => (i % 3 ? -step : step) * value);
  return [values.subarray(0, values.length / 2), values.subarray(values.length / 2)];
}

/** Vertex normals: area-weighted sums of face normals, which the shader normalises. */
function normalsOf(vertices, faces) {
  const normals = new Float32Array(vertices.length);
  for (let f = 0; f < faces.length; f += 3) {
    const [a, b, c] = [3 * faces[f], 3 * faces[f + 1], 3 * faces[f + 2]];
    const u = [0, 1, 2].map((k) => vertices[b + k] - vertices[a + k]);
    const v = [0, 1, 2].map((k) => vertices[c + k] - vertices[a + k]);
    for (let k = 0; k < 3; k += 1) {
      const value = u[(k + 1) % 3] * v[(k + 2) % 3] - u[(k + 2) % 3] * v[(k + 1) % 3];
      for (const corner of [a, b, c]) normals[corner + k] += value;
    }
  }
  return normals;
}

/** The column-major rotation matrix after a further rotation about the screen's axes, in rad. */
function rotated(rotation, aboutX, aboutY) {
  const [cx, sx, cy, sy] = [Math.cos(aboutX), Math.sin(aboutX), Math.cos(aboutY), Math.sin(aboutY)];
  const result = [];
  for (let column = 0; column < 3; column += 1) {
    const [x, y, z] = rotation.slice(3 * column, 3 * column + 3);
    const [rightwards, back] = [cy * x + sy * z, cy * z - sy * x];
    result.push(rightwards, cx * y - sx * back, sx * y + cx * back);
  }
  return result;
}

/** Creates the viewer of a canvas, or returns null without WebGL2. */
function createViewer(canvas, colours) {
  const gl = canvas.getContext('webgl2', { antialias: true });
  if (!gl) return null;
  const identity = [1, 0, 0, 0, 1, 0, 0, 0, 1];
  const view = { rotation: identity, zoom: 1, stage: 0, truth: 'on', place: 'own' };
  let sample, faces, uniforms, hands, asked;

  function prepare() {
    const program = gl.createProgram();
    for (const [kind, source] of [[gl.VERTEX_SHADER, VERTEX_SHADER], [gl.FRAGMENT_SHADER, FRAGMENT_SHADER]]) {
      const shader = gl.createShader(kind);
      gl.shaderSource(shader, source);
      gl.compileShader(shader);
      gl.attachShader(program, shader);
    }
    ['position', 'normal'].forEach((name, place) => gl.bindAttribLocation(program, place, name));
    gl.linkProgram(program);
    gl.useProgram(program);
    uniforms = Object.fromEntries(['projection', 'rotation', 'place', 'distance_', 'colour'].map(
      (name) => [name, gl.getUniformLocation(program, name)]));
    hands = { prediction: [0, 1].map(createHand), truth: [0, 1].map(createHand) };
  }

  function createHand(side) {
    const hand = { array: gl.createVertexArray(), buffers: [gl.createBuffer(), gl.createBuffer()], side };
    gl.bindVertexArray(hand.array);
    hand.buffers.forEach((buffer, place) => {
      gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
      gl.enableVertexAttribArray(place);
      gl.vertexAttribPointer(place, 3, gl.FLOAT, false, 0, 0);
    });
    gl.bindBuffer(gl.ELEMENT_ARRAY_BUFFER, gl.createBuffer());
    return hand;
  }

  function fill(hand, vertices) {
    gl.bindVertexArray(hand.array);
    gl.bufferData(gl.ELEMENT_ARRAY_BUFFER, faces[hand.side], gl.STATIC_DRAW);
    [vertices, normalsOf(vertices, faces[hand.side])].forEach((values, place) => {
      gl.bindBuffer(gl.ARRAY_BUFFER, hand.buffers[place]);
      gl.bufferData(gl.ARRAY_BUFFER, values, gl.STATIC_DRAW);
    });
  }

  function load() {
    unpackHands(sample.stages[view.stage], sample.step).forEach((mesh, side) => fill(hands.prediction[side], mesh));
    sample.truthMeshes.forEach((mesh, side) => fill(hands.truth[side], mesh));
    redraw();
  }

  /** Bounding sphere over the ground truth and all stages, so that the view stays put between stages. */
  function measure() {
    const [low, high] = [[Infinity, Infinity, Infinity], [-Infinity, -Infinity, -Infinity]];
    const pairs = [sample.truthMeshes, ...sample.stages.map((stage) => unpackHands(stage, sample.step))];
    pairs.forEach((pair) => pair.forEach((mesh, side) => mesh.forEach((value, i) => {
      const placed = value + (side ? sample.trueRoot[i % 3] : 0);
      low[i % 3] = Math.min(low[i % 3], placed);
      high[i % 3] = Math.max(high[i % 3], placed);
    })));
    sample.centre = low.map((value, k) => (value + high[k]) / 2);
    sample.radius = Math.hypot(...low.map((value, k) => high[k] - value)) / 2;
  }

  function redraw() {
    if (asked || !sample) return;
    asked = requestAnimationFrame(() => { asked = 0; draw(); });
  }

  function draw() {
    const scale = Math.min(window.devicePixelRatio || 1, 2);
    const [width, height] = [canvas.clientWidth, canvas.clientHeight].map((size) => Math.max(1, Math.round(size * scale)));
    if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
    const narrow = Math.min(1, width / height);
    const distance = 0.85 * sample.radius / Math.sin(FIELD_OF_VIEW / 2) / narrow / view.zoom;
    const [near, far] = [Math.max(distance - 4 * sample.radius, distance / 100), distance + 4 * sample.radius];
    const focal = 1 / Math.tan(FIELD_OF_VIEW / 2);
    gl.viewport(0, 0, width, height);
    gl.clearColor(0, 0, 0, 0);
    gl.depthMask(true);
    gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
    gl.enable(gl.DEPTH_TEST);
    gl.uniformMatrix4fv(uniforms.projection, false, [focal * height / width, 0, 0, 0, 0, focal, 0, 0, 0, 0,
      (near + far) / (near - far), -1, 0, 0, 2 * near * far / (near - far), 0]);
    gl.uniformMatrix3fv(uniforms.rotation, false, view.rotation);
    gl.uniform1f(uniforms.distance_, distance);
    if (view.truth !== 'only') {
      const offset = view.place === 'offset' ? flipped(sample.offsets[view.stage]) : sample.trueRoot;
      hands.prediction.forEach((hand) => drawHand(hand, offset, [...colours[hand.side], 1]));
    }
    if (view.truth === 'only') hands.truth.forEach((hand) => drawHand(hand, sample.trueRoot, [...TRUTH_COLOUR, 1]));
    if (view.truth === 'on') drawVeil();
  }

  /** Blends only the nearest surface of the ground truth: a depth pass, then a colour pass. */
  function drawVeil() {
    gl.depthFunc(gl.LEQUAL);
    gl.colorMask(false, false, false, false);
    hands.truth.forEach((hand) => drawHand(hand, sample.trueRoot, [...TRUTH_COLOUR, VEIL]));
    gl.colorMask(true, true, true, true);
    gl.enable(gl.BLEND);
    gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
    hands.truth.forEach((hand) => drawHand(hand, sample.trueRoot, [...TRUTH_COLOUR, VEIL]));
    gl.disable(gl.BLEND);
  }

  function drawHand(hand, rightRoot, colour) {
    gl.bindVertexArray(hand.array);
    gl.uniform3fv(uniforms.place, sample.centre.map((value, k) => (hand.side ? rightRoot[k] : 0) - value));
    gl.uniform4fv(uniforms.colour, colour);
    gl.drawElements(gl.TRIANGLES, faces[hand.side].length, gl.UNSIGNED_SHORT, 0);
  }

  function flipped([x, y, z]) {
    return [x, -y, -z];
  }

  prepare();
  canvas.addEventListener('webglcontextlost', (event) => event.preventDefault());
  canvas.addEventListener('webglcontextrestored', () => { prepare(); if (sample) load(); });
  new ResizeObserver(redraw).observe(canvas);
  return {
    view,
    show(next, facesOfHands) {
      faces = facesOfHands.map((text) => new Uint16Array(bytesOf(text)));
      sample = { ...next, truthMeshes: unpackHands(next.truth, next.step), trueRoot: flipped(next.true_offset) };
      view.stage = Math.min(view.stage, next.stages.length - 1);
      measure();
      load();
    },
    choose(name, value) {
      view[name] = value;
      load();
    },
    turn(aboutX, aboutY) {
      view.rotation = rotated(view.rotation, aboutX, aboutY);
      redraw();
    },
    zoom(factor) {
      view.zoom = Math.min(Math.max(view.zoom * factor, 0.3), 12);
      redraw();
    },
    reset() {
      Object.assign(view, { rotation: identity, zoom: 1 });
      redraw();
    },
  };
}
