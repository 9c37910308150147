// Requests to the server.

export async function getJson(path, signal) {
  return answered(await reach(path, { signal }));
}

export async function postJson(path, body, signal) {
  return answered(await reach(path, posted(body, signal)));
}

// Returns {edges, whole, curves: [{key | group, count, x, y, raw_x, raw_y, low, high}]}.
export async function curves(body, signal) {
  const response = await reach("/api/curves", posted(body, signal));
  const buffer = await response.arrayBuffer();
  const length = new DataView(buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  header.curves.forEach((curve, place) => {
    for (const [name, [first, count]] of Object.entries(header.columns[place] ?? {})) {
      curve[name] = new Float64Array(buffer, 4 + length + 8 * first, count);
    }
  });
  return header;
}

function posted(body, signal) {
  return { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal };
}

async function reach(path, options) {
  let response;
  try {
    response = await fetch(path, { cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the dashboard does not answer: it has ended, or the tunnel to it has");
  }
  if (response.status === 401) throw new Error("the dashboard was started again: open the URL that it printed");
  if (!response.ok && response.status !== 422) throw new Error(`the dashboard answered ${response.status}`);
  return response;
}

async function answered(response) {
  const answer = await response.json();
  if (answer.error && response.status === 422) throw new Error(answer.error);
  return answer;
}
