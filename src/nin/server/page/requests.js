// Requests by name, each made once; those under way can be forgotten, and are made again when they are wanted again.

export class Requests {
  constructor() {
    this.made = new Map();
    this.pending = new Set();
  }

  once(name, request) {
    if (!this.made.has(name)) {
      const answer = request();
      const forget = () => this.made.get(name) === answer && this.made.delete(name);
      this.made.set(name, answer);
      this.pending.add(forget);
      answer.then(() => this.pending.delete(forget), forget);
    }
    return this.made.get(name);
  }

  forgetPending() {
    for (const forget of this.pending) forget();
    this.pending.clear();
  }
}
