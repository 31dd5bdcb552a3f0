// A Java program with a large graph of objects that several threads change and verify all the time, so that
// the collector moves them: each knows by a seed what it must hold, and by name what it leads to. Prints
// `ready`; SIGUSR1 asks for `ok N`.
import java.nio.ByteBuffer;
import java.util.Arrays;
import java.util.Map;
import java.util.concurrent.atomic.AtomicBoolean;
import java.util.concurrent.atomic.AtomicLong;

public class Graph {
    static final int NODES = 60000, EDGES = 3, THREADS = 4, BUFFER = 1 << 20;
    static final AtomicLong steps = new AtomicLong();

    static void die(String what) {
        System.out.println("FAIL " + what);
        Runtime.getRuntime().halt(1);
    }

    static final class Node {
        final int number, seed;
        final String text;
        final double[] floats = new double[8];
        final Map<String, Integer> map;
        Node[] edges = new Node[0];
        String[] names = new String[0];

        Node(int number, int seed) {
            this.number = number;
            this.seed = seed;
            text = text(number, seed);
            Arrays.fill(floats, seed / 3.0);
            map = Map.of("seed", seed, "number", number);
        }

        static String text(int number, int seed) {
            return "node " + number + " with " + seed + " " + "x".repeat(seed % 100);
        }

        void leadTo(Node... nodes) {
            edges = nodes;
            names = Arrays.stream(nodes).map(node -> node.number + ":" + node.seed).toArray(String[]::new);
        }

        void verify() {
            if (!text.equals(text(number, seed))) die("node " + number + ": " + text);
            for (double value : floats) if (value != seed / 3.0) die("floats of " + number);
            if (map.get("seed") != seed || map.get("number") != number) die("map of " + number);
            for (int i = 0; i < edges.length; i++)
                if (!names[i].equals(edges[i].number + ":" + edges[i].seed)) die("edge of " + number);
        }
    }

    /** A part of the graph that belongs to one thread, and memory outside of the heap. */
    static final class Part extends Thread {
        final Node[] nodes = new Node[NODES / THREADS];
        final ByteBuffer outside = ByteBuffer.allocateDirect(BUFFER);
        final AtomicBoolean asked = new AtomicBoolean();
        int state, filled;

        Part(int seed) {
            state = seed;
            for (int i = 0; i < nodes.length; i++) nodes[i] = new Node(i, choose(1 << 30));
        }

        int choose(int below) {
            state = state * 1664525 + 1013904223;
            return Integer.remainderUnsigned(state, below);
        }

        void step() {
            int at = choose(nodes.length);
            nodes[at].verify();
            Node fresh = new Node(at, choose(1 << 30));
            Node[] others = new Node[EDGES];
            for (int i = 0; i < EDGES; i++) others[i] = nodes[choose(nodes.length)];
            fresh.leadTo(others);
            nodes[at].leadTo(); // what others lead to keeps nothing else alive
            nodes[at] = fresh;
            int place = choose(BUFFER / 8) * 8;
            outside.putLong(place, place + (long) filled);
            if (outside.getLong(place) != place + (long) filled) die("memory outside at " + place);
            steps.incrementAndGet();
        }

        void verifyAll() {
            for (Node node : nodes) node.verify();
            filled++;
            for (int place = 0; place < BUFFER; place += 8) outside.putLong(place, place + (long) filled);
            for (int place = 0; place < BUFFER; place += 8)
                if (outside.getLong(place) != place + (long) filled) die("memory outside at " + place);
        }

        @Override
        public void run() {
            try {
                while (true) {
                    for (int i = 0; i < 200; i++) step();
                    if (asked.get()) {
                        verifyAll();
                        asked.set(false);
                    }
                    Thread.sleep(1);
                }
            } catch (Throwable error) {
                die(error.toString());
            }
        }
    }

    public static void main(String[] args) throws Exception {
        AtomicBoolean signalled = new AtomicBoolean();
        sun.misc.Signal.handle(new sun.misc.Signal("USR1"), signal -> signalled.set(true));
        Part[] parts = new Part[THREADS];
        for (int i = 0; i < THREADS; i++) (parts[i] = new Part(i + 1)).start();
        System.out.println("ready");
        while (true) {
            Thread.sleep(1);
            if (!signalled.getAndSet(false)) continue;
            for (Part part : parts) part.asked.set(true);
            for (Part part : parts) while (part.asked.get()) Thread.sleep(1);
            System.gc();
            System.out.println("ok " + steps.get());
        }
    }
}
