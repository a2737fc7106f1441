// Requests. All addresses are relative, so they keep the token of the page.

/** An answer of the server. Throws an Error whose message is for the user. */
export async function ask(name, parameters = {}, body = null) {
  const known = Object.entries(parameters).filter(([, v]) => v !== null && v !== undefined);
  const address = `api/${name}?${new URLSearchParams(known)}`;
  let response;
  try {
    response = await fetch(address, body === null ? {} : { method: "POST", body });
  } catch {
    throw new Error("The server does not answer. Is `musigma explore` still running?");
  }
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(answer.message ?? `The server answers ${response.status}.`);
  return answer;
}

const slots = new Map();

/** Ask once at a time for each name; of the questions that wait, only the newest is asked. */
export async function latest(name, parameters, then, failed) {
  const slot = slots.get(name) ?? { busy: false, next: null };
  slots.set(name, slot);
  if (slot.busy) {
    slot.next = [parameters, then, failed];
    return;
  }
  slot.busy = true;
  try {
    then(await ask(name, parameters));
  } catch (error) {
    failed(error);
  }
  slot.busy = false;
  if (slot.next) {
    const next = slot.next;
    slot.next = null;
    latest(name, ...next);
  }
}
