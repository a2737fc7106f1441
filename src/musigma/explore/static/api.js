// Questions of the views, one at a time.

import { ask } from "./source.js";

export { ask };

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
